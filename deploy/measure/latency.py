"""Paired comparison of the speed of two callables, which a machine that becomes slower or faster does not distort.

The two run in turn (A B A B ...), and the result is the median ratio of neighbours. Absolute times are reported too, but on
a shared machine only the ratio can be relied on.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


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


def compare(baseline: Callable[[], Any], candidate: Callable[[], Any], rounds: int = 15, warmup: int = 2) -> Comparison:
    """Time two callables in turn for `rounds` rounds after `warmup` uncounted calls of each."""
    for _ in range(warmup):
        baseline()
        candidate()
    times = np.array([(_milliseconds(baseline), _milliseconds(candidate)) for _ in range(rounds)])
    ratios = times[:, 0] / times[:, 1]
    draws = np.random.default_rng(0).choice(ratios, (2000, rounds))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    baseline_ms, candidate_ms = np.median(times, axis=0)
    return Comparison(
        float(np.median(ratios)), float(low), float(high), float(baseline_ms), float(candidate_ms), rounds
    )
