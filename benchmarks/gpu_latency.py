"""`python -m benchmarks.gpu_latency MODEL RECIPE ..`: time of engines on this machine's GPU, FP16 beside the INT8 packages.

    make engine MODEL=dinov2_s; make engine MODEL=dinov2_s RECIPE=int8_qwt
    python -m benchmarks.gpu_latency dinov2_s int8 int8_qwt

All engines are built anew, with the same backend and profile, from the float network in FP16 and from each package's
model.onnx; or, with `--graphs FOLDER`, from the graphs in a folder: fp16.onnx and any others, which may come from a machine
without a GPU. Timed is the engine alone, between two events around the launch of a CUDA graph (or of its kernels one by one,
where the device has no graphs): no copies, no waiting of the host. The engines take turns, A B C A B C, so that a clock that
drifts reaches all of them alike, and start when their times have settled.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from calib.errors import UserError
from deploy import host
from deploy.cli import Parser, answered
from deploy.engine.backends import choose_backend
from deploy.engine.build import Profile
from deploy.engine.isolated import build_apart
from deploy.engine.runner import EngineRunner
from deploy.measure.latency import FASTER, comparison
from deploy.package import MANIFEST, MODEL, package_folder, read_json
from deploy.report.evidence import tool_commit

RESULTS = Path(__file__).parent / "results"
FP16 = "fp16"  # the engine that the others are compared with
BATCHES = (1, 8, 32, 128)
PROFILE = Profile(opt=8, maximum=max(BATCHES))
ROUNDS = 200  # of every engine at every batch size
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


def measure(engines: Mapping[str, EngineRunner], batch: int, rounds: int) -> dict[str, Any]:
    """Times of all open `engines` at one batch size, in turn, and of each how it compares with the first."""
    timed = {name: Timed(engine, batch) for name, engine in engines.items()}
    medians: dict[str, list[float]] = {name: [] for name in timed}

    def in_turn(count: int) -> dict[str, list[float]]:
        found = [[each.ms() for each in timed.values()] for _ in range(count)]
        return {name: [row[index] for row in found] for index, name in enumerate(timed)}

    while not (steady := all(map(settled, medians.values()))) and len(next(iter(medians.values()))) < MOST_WINDOWS:
        for name, window in in_turn(WINDOW).items():
            medians[name].append(float(np.median(window)))
    times = in_turn(rounds)
    baseline = next(iter(times.values()))
    engines_json = {
        name: {**statistics(ms, batch), **({} if ms is baseline else {"speedup": speedup(baseline, ms)})}
        for name, ms in times.items()
    }
    graphs = all(each.graph is not None for each in timed.values())
    return {"batch": batch, "rounds": rounds, "settled": steady, "cuda_graph": graphs, "engines": engines_json}


def graphs_of(model: str, recipes: Sequence[str], out: str) -> dict[str, onnx.ModelProto]:
    """The float network in FP16, and the graphs of the packages. Raises UserError for a package that is missing."""
    from calib.weights.load import load_net
    from calib.weights.zoo import spec_of
    from deploy.bridge.export import export_fp16

    folders = {recipe: package_folder(out, model, None, "auto", recipe) for recipe in recipes}
    sizes = set()
    for recipe, folder in folders.items():
        if not (folder / MANIFEST).exists():
            raise UserError(f"no package at '{folder}': run make engine MODEL={model} RECIPE={recipe} first")
        preprocessing = read_json(folder / MANIFEST)["preprocessing"]
        sizes.add((preprocessing["height"], preprocessing["width"]))
    if len(sizes) != 1:
        raise UserError(f"the packages take images of different sizes ({sizes}): expected one; build them again")
    (size,) = sizes
    net = load_net(spec_of(model, None, size), "random").net  # the time does not depend on the weights
    return {FP16: export_fp16(net, size), **{name: onnx.load(folder / MODEL) for name, folder in folders.items()}}


def graphs_in(folder: Path) -> dict[str, onnx.ModelProto]:
    """The graphs (*.onnx) in `folder` by name, that in FP16 first. Raises UserError if that, or any other, is missing."""
    paths = {path.stem: path for path in sorted(folder.glob("*.onnx"))}
    if FP16 not in paths or len(paths) < 2:
        raise UserError(
            f"'{folder}' holds {', '.join(paths) or 'no graphs'}: expected {FP16}.onnx and others to compare"
        )
    return {name: onnx.load(paths[name]) for name in (FP16, *(each for each in paths if each != FP16))}


def lines(row: dict[str, Any]) -> list[str]:
    """What was measured at one batch size, one line per engine."""
    shown = []
    for name, each in row["engines"].items():
        ratio = each.get("speedup")
        beside = (
            f"  {ratio['ratio']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f}), {ratio['verdict']}" if ratio else ""
        )
        shown.append(
            f"batch {row['batch']:4} {name:24} median {each['median_ms']:8.3f} ms, p99 {each['p99_ms']:8.3f} ms, "
            f"{each['images_s']:9.0f} images/s{beside}{'' if row['settled'] else '  (never settled)'}"
        )
    return shown


def _main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.gpu_latency", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as MODEL= of make engine")
    parser.add_argument("recipes", nargs="*", help="recipes whose packages were built")
    parser.add_argument(
        "--graphs", type=Path, help="a folder with fp16.onnx and the graphs to compare, instead of recipes"
    )
    parser.add_argument("--target", default="auto", help="auto, tensorrt or tensorrt_rtx")
    parser.add_argument("--out", default="artifacts", help="root of the packages (default artifacts)")
    args = parser.parse_args(argv)
    if bool(args.recipes) == bool(args.graphs):
        raise UserError("expected either recipes or --graphs, not both")
    backend, _ = choose_backend(args.target)
    if reason := backend.cannot_run():
        raise UserError(f"{backend.NAME} cannot run engines here: {reason}")
    graphs = graphs_in(args.graphs) if args.graphs else graphs_of(args.model, args.recipes, args.out)
    plans = {name: build_apart(backend, graph, PROFILE, None).plan for name, graph in graphs.items()}
    with ExitStack() as opened:
        engines = {
            name: opened.enter_context(EngineRunner(plan, import_module(backend.NAME))) for name, plan in plans.items()
        }
        rows = []
        for batch in BATCHES:
            rows.append(measure(engines, batch, ROUNDS))
            print("\n".join(lines(rows[-1])), flush=True)
    found = {
        "model": args.model, "backend": backend.NAME, "version": backend.version(), "batches": rows,
        "profile": [1, PROFILE.opt, PROFILE.maximum], "machine": host.describe(), "commit": tool_commit(),
        "command": f"python -m benchmarks.gpu_latency {' '.join(argv)}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    (RESULTS / f"gpu_latency.{args.model.replace('/', '_')}.json").write_text(json.dumps(found, indent=2) + "\n")
    return 0


def main(argv: Sequence[str]) -> int:
    """Measure; returns the exit code."""
    return answered(lambda: _main(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
