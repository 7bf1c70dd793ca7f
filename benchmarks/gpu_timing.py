"""Times of open engines that take turns, A B C A B C, once they have settled: what `benchmarks.gpu_latency` measures."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deploy.engine.gpu_state import GpuMonitor
from deploy.engine.runner import EngineRunner
from deploy.measure.latency import FASTER, comparison

ROUNDS, SECONDS = 200, 3.0  # of every engine at every batch size: at least so many, and so long
WINDOW, WINDOWS_ALIKE, ALIKE = 20, 3, 0.01  # settled: so many medians of so many launches differ by so little
MOST_WINDOWS = 25


def settled(medians: Sequence[float]) -> bool:
    """Whether the last WINDOWS_ALIKE `medians` differ by no more than the share ALIKE."""
    last = medians[-WINDOWS_ALIKE:]
    return len(last) == WINDOWS_ALIKE and max(last) <= min(last) * (1 + ALIKE)


def statistics(ms: Sequence[float], batch: int) -> dict[str, float]:
    """Median, 90th and 99th percentile of the times of `batch` images (ms), and images per second at the median."""
    median, p90, p99 = np.percentile(ms, [50, 90, 99])
    return {
        "median_ms": float(median),
        "p90_ms": float(p90),
        "p99_ms": float(p99),
        "images_s": float(batch / median * 1e3),
    }


def speedup(baseline: Sequence[float], candidate: Sequence[float]) -> dict[str, Any]:
    """Time of the baseline over that of the candidate: the median over rounds, and its 95 % bootstrap interval.

    `verdict`: "faster" or "slower" if the median lies beyond FASTER and the interval does not hold 1, else "alike".
    """
    found = comparison(np.asarray(baseline), np.asarray(candidate))
    faster, slower = found.ratio > FASTER and found.low > 1, found.ratio < 1 / FASTER and found.high < 1
    verdict = "faster" if faster else "slower" if slower else "alike"
    return {"ratio": found.ratio, "low": found.low, "high": found.high, "verdict": verdict}


def captured(engine: EngineRunner) -> Any | None:
    """The CUDA graph of one launch; None where the device has no graphs or the engine cannot be captured."""
    try:
        return engine.device.captured(engine.enqueue, engine.stream)
    except RuntimeError as error:
        print(f"no CUDA graph ({error}): kernels are launched one by one", file=sys.stderr)
        return None


class Timed:
    """An open engine, ready to run one batch again and again."""

    def __init__(self, engine: EngineRunner, batch: int) -> None:
        self.engine, self.device = engine, engine.device
        generator = np.random.default_rng(0)
        engine.bind({
            name: generator.normal(size=(batch, *tensor.shape)).astype(tensor.dtype)
            for name, tensor in engine.tensors.inputs.items()
        })  # fmt: skip
        engine.enqueue()  # a first call for a shape prepares it, which a graph cannot hold
        engine.fetch()
        self.graph = captured(engine)
        self.begin, self.end = self.device.event(), self.device.event()

    def ms(self) -> float:
        """Milliseconds of one launch."""
        self.device.record(self.begin, self.engine.stream)
        if self.graph is None:
            self.engine.enqueue()
        else:
            self.device.launch(self.graph, self.engine.stream)
        self.device.record(self.end, self.engine.stream)
        return self.device.elapsed_ms(self.begin, self.end)


def measure(
    engines: Mapping[str, EngineRunner],
    batch: int,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    monitor: GpuMonitor | None = None,
) -> dict[str, Any]:
    """Times of all open `engines` at one batch size, in turn, and of each how it compares with the first.

    At least `rounds` of every engine, and `seconds` of the fastest.
    """
    timed = {name: Timed(engine, batch) for name, engine in engines.items()}
    medians: dict[str, list[float]] = {name: [] for name in timed}
    times: dict[str, list[float]] = {name: [] for name in timed}

    def in_turn(count: int) -> dict[str, list[float]]:
        found = [[each.ms() for each in timed.values()] for _ in range(count)]
        if monitor is not None:
            monitor.look()
        return {name: [row[index] for row in found] for index, name in enumerate(timed)}

    while not (steady := all(map(settled, medians.values()))) and len(next(iter(medians.values()))) < MOST_WINDOWS:
        for name, window in in_turn(WINDOW).items():
            medians[name].append(float(np.median(window)))
    if monitor is not None:
        monitor.summary()  # of warming up, which is not what was timed
    while (done := len(next(iter(times.values())))) < rounds or min(map(sum, times.values())) < seconds * 1e3:
        for name, window in in_turn(min(WINDOW, rounds - done) if done < rounds else WINDOW).items():
            times[name] += window
    baseline = next(iter(times.values()))
    engines_json = {
        name: {**statistics(ms, batch), **({} if ms is baseline else {"speedup": speedup(baseline, ms)})}
        for name, ms in times.items()
    }
    graphs = all(each.graph is not None for each in timed.values())
    return {
        "batch": batch, "rounds": len(baseline), "settled": steady, "cuda_graph": graphs, "engines": engines_json,
        "gpu": None if monitor is None else monitor.summary(),
    }  # fmt: skip
