"""Paired comparison of the speed of two callables, which a machine that becomes slower or faster does not distort.

They run in turn (A B A B ...), and the result is the median ratio of neighbours. Absolute times are reported too, but on
a shared machine only the ratio can be relied on.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

FASTER = 1.02  # a smaller ratio of times may be the clock


@dataclass(frozen=True)
class Comparison:
    """`ratio` = time of the baseline / time of the candidate (above 1: the candidate is faster), median over rounds.

    `low`, `high`: 95 % bootstrap interval of that median. Times in milliseconds per call, median.
    """

    ratio: float
    low: float
    high: float
    baseline_ms: float
    candidate_ms: float
    rounds: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def _milliseconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def times_in_turn(calls: Sequence[Callable[[], Any]], rounds: int = 15, warmup: int = 2) -> np.ndarray:
    """Milliseconds (rounds, calls) of `calls`, which run in turn (A B C A B C ...) after `warmup` uncounted rounds."""
    for _ in range(warmup):
        for call in calls:
            call()
    return np.array([[_milliseconds(call) for call in calls] for _ in range(rounds)])


def comparison(baseline: np.ndarray, candidate: np.ndarray) -> Comparison:
    """Compare times in milliseconds (rounds,) that were measured in turn."""
    ratios = baseline / candidate
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    ratio, baseline_ms, candidate_ms = (float(np.median(each)) for each in (ratios, baseline, candidate))
    return Comparison(ratio, float(low), float(high), baseline_ms, candidate_ms, len(ratios))


def compare(baseline: Callable[[], Any], candidate: Callable[[], Any], rounds: int = 15, warmup: int = 2) -> Comparison:
    """Time two callables in turn for `rounds` rounds after `warmup` uncounted calls of each."""
    times = times_in_turn((baseline, candidate), rounds, warmup)
    return comparison(times[:, 0], times[:, 1])
