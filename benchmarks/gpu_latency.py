"""`python -m benchmarks.gpu_latency MODEL RECIPE ..`: time of engines on this machine's GPU, FP16 beside the INT8 packages.

    make engine MODEL=dinov2_s; make engine MODEL=dinov2_s RECIPE=int8_qwt
    python -m benchmarks.gpu_latency dinov2_s int8 int8_qwt

All engines are built anew, with the same backend and profile, from the float network in FP16 (with `--fp32` in FP32 too) and
from each package's model.onnx; with `--fp8` also from a copy of that with FP8 in place of INT8. With `--graphs FOLDER` they
are built from the graphs in a folder: fp16.onnx and any others, which may come from a machine without a GPU.

Timed is the engine alone, between two events around the launch of a CUDA graph (or of its kernels one by one, where the
device has no graphs): no copies, no waiting of the host. That is what trtexec calls GPU compute time; with TensorRT its
command is beside every row. The engines take turns, A B C A B C, so that a clock that drifts reaches all of them alike, and
start when their times have settled. Clocks, power and temperature are looked at between the rounds. What an engine computes
is compared with the golden images of its package, on the same GPU.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.gpu_charts import write_charts
from benchmarks.gpu_graphs import Subject, graphs_in, graphs_of
from benchmarks.gpu_timing import ROUNDS, SECONDS, measure
from calib.errors import UserError, first_line
from deploy import host
from deploy.cli import Parser, answered
from deploy.engine.backends import TENSORRT, TENSORRT_RTX, choose_backend
from deploy.engine.build import Profile
from deploy.engine.gpu_state import GpuMonitor
from deploy.engine.isolated import build_apart
from deploy.engine.runner import EngineRunner
from deploy.errors import ContractError
from deploy.execution import golden_sqnr_db
from deploy.gpu import gpu
from deploy.package import GOLDEN
from deploy.report.evidence import tool_commit
from deploy.verify import golden_arrays

RESULTS = Path(__file__).parent / "results"
BATCHES = (1, 8, 32, 128)
TARGETS = ("auto", TENSORRT, TENSORRT_RTX)
TUNED = 8  # the batch size that engines are tuned for, where it is one of those timed
WARM_UP_MS = 200  # of trtexec, whose default it is
FP8_FROM = 89  # compute capability


def trtexec(version: str, plan: Path, engine: EngineRunner, batch: int, cuda_graph: bool) -> str:
    """Return the command of trtexec that times the same: the defaults of TensorRT 11, spelled out for 10."""
    shapes = ",".join(
        f"{name}:{'x'.join(map(str, (batch, *tensor.shape)))}" for name, tensor in engine.tensors.inputs.items()
    )
    flags = [
        f"--loadEngine={plan}", f"--shapes={shapes}", f"--warmUp={WARM_UP_MS}", f"--duration={SECONDS:.0f}",
        f"--iterations={ROUNDS}", "--percentile=90,99",
    ]  # fmt: skip
    if int(version.split(".")[0]) < 11:
        flags += ["--noDataTransfers", "--useSpinWait", *(["--useCudaGraph"] if cuda_graph else [])]
    elif not cuda_graph:
        flags.append("--noCudaGraph")
    return " ".join(["trtexec", *flags])


@dataclass(frozen=True)
class Plan:
    """A built engine: the file it was written to, and its content."""

    path: Path
    content: bytes

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        sha256 = hashlib.sha256(self.content).hexdigest()
        return {"file": str(self.path), "sha256": sha256, "bytes": len(self.content)}


def built(name: str, subject: Subject, backend: ModuleType, profile: Profile, folder: Path) -> Plan | None:
    """Build the engine of `subject` into `folder`; None, and a line, for an optional one that the backend does not build."""
    try:
        content = build_apart(backend, subject.graph, profile, None).plan
    except (UserError, ContractError) as error:
        if not subject.optional:
            raise
        print(f"no engine {name}: {first_line(error)}", file=sys.stderr)
        return None
    path = folder / f"{name.replace(', ', '_').lower()}.engine"
    path.write_bytes(content)
    return Plan(path, content)


def accuracy(subject: Subject, engine: EngineRunner) -> float | None:
    """Return the SQNR (dB) of an open engine on the golden images of its package; None where it is compared with none."""
    if subject.golden is None:
        return None
    given, reference, _ = golden_arrays(subject.golden / GOLDEN)
    return golden_sqnr_db(engine, given, reference)


def gpu_line(found: Mapping[str, Any] | None) -> str | None:
    """What the GPU did meanwhile, or None where nobody looked."""
    if found is None:
        return None
    if "unknown" in found:
        return f"  clocks unknown: {found['unknown']}"
    clock, power, heat = found["sm_clock"], found["power"], found["temperature"]
    told = [
        *([f"SM clock {clock[0]} to {clock[1]} MHz (at most {found['highest_sm_clock']})"] if clock else []),
        *([f"{power[1]:.0f} of {found['power_limit'] or 0:.0f} W"] if power else []),
        *([f"{heat[1]} C"] if heat else []),
        *([f"clocks lowered by {', '.join(found['slowed'])}"] if found["slowed"] else []),
        *(["clocks set by hand"] if found["clocks_set"] else []),
    ]
    return f"  {', '.join(told) or 'the driver tells nothing of clocks'}"


def lines(row: dict[str, Any]) -> list[str]:
    """What was measured at one batch size, one line per engine and one on the GPU."""
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
    seen = gpu_line(row["gpu"])
    return [*shown, *([seen] if seen else [])]


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options. Raises UserError if they do not fit together."""
    parser = Parser(prog="python -m benchmarks.gpu_latency", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as MODEL= of make engine")
    parser.add_argument("recipes", nargs="*", help="recipes whose packages were built")
    parser.add_argument(
        "--graphs", type=Path, help="a folder with fp16.onnx and the graphs to compare, instead of recipes"
    )
    parser.add_argument("--target", default="auto", help="auto, tensorrt or tensorrt_rtx")
    parser.add_argument("--weights", default="auto", help="weights of the packages, as in make engine")
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES, help="batch sizes (default 1 8 32 128)")
    parser.add_argument("--fp32", action="store_true", help="the float network in FP32 too")
    parser.add_argument("--fp8", action="store_true", help="copies of the INT8 graphs with FP8 in its place too")
    parser.add_argument("--out", default="artifacts", help="root of the packages (default artifacts)")
    options = parser.parse_args(argv)
    if bool(options.recipes) == bool(options.graphs):
        raise UserError("expected either recipes, such as int8, or --graphs FOLDER")
    if options.graphs and (options.fp32 or options.fp8):
        raise UserError("--fp32 and --fp8 are made of packages: put such graphs into the folder of --graphs instead")
    if any(batch < 1 for batch in options.batch):
        raise UserError(f"--batch {min(options.batch)}: expected 1 or more")
    return options


def measured(options: argparse.Namespace, backend: ModuleType) -> dict[str, Any]:
    """Build, judge and time the engines that `options` name."""
    if options.fp8 and (here := gpu().compute_capability) < FP8_FROM:
        raise UserError(f"--fp8: this GPU (SM{here}) computes no FP8, expected SM{FP8_FROM} or later")
    subjects = graphs_in(options.graphs) if options.graphs else graphs_of(options)
    folder = Path(options.out) / "gpu_latency" / options.model.replace("/", "_")
    folder.mkdir(parents=True, exist_ok=True)
    profile = Profile(opt=TUNED if TUNED in options.batch else max(options.batch), maximum=max(options.batch))
    tried = {name: built(name, subject, backend, profile, folder) for name, subject in subjects.items()}
    plans = {name: plan for name, plan in tried.items() if plan is not None}
    with ExitStack() as opened:
        monitor = opened.enter_context(GpuMonitor())
        engines = {
            name: opened.enter_context(EngineRunner(plan.content, import_module(backend.NAME)))
            for name, plan in plans.items()
        }
        golden = {name: accuracy(subjects[name], engine) for name, engine in engines.items()}
        rows = []
        for batch in options.batch:
            rows.append(measure(engines, batch, monitor=monitor))
            print("\n".join(lines(rows[-1])), flush=True)
            if backend.NAME == TENSORRT:
                rows[-1]["trtexec"] = {
                    name: trtexec(backend.version(), plans[name].path, engine, batch, rows[-1]["cuda_graph"])
                    for name, engine in engines.items()
                }
    return {
        "plans": {name: {**plan.to_json(), "golden_sqnr_db": golden[name]} for name, plan in plans.items()},
        "batches": rows, "not_built": [name for name in tried if name not in plans],
        "profile": [1, profile.opt, profile.maximum],
    }  # fmt: skip


def result_file(model: str) -> Path:
    """Where the figures of a network are written."""
    return RESULTS / f"gpu_latency.{model.replace('/', '_')}.json"


def gpu_backend(target: str) -> ModuleType:
    """Return the backend of `target`. Raises UserError for one that runs on no GPU, or cannot run here."""
    if target not in TARGETS:
        raise UserError(f"--target {target}: expected {', '.join(TARGETS)}")
    backend, _ = choose_backend(target)
    if reason := backend.cannot_run():
        raise UserError(f"{backend.NAME} cannot run engines here: {reason}")
    return backend


def _main(argv: Sequence[str]) -> int:
    options = parsed(argv)
    backend = gpu_backend(options.target)
    found = {
        "model": options.model, "backend": backend.NAME, "version": backend.version(), "machine": host.describe(),
        "commit": tool_commit(), "command": f"python -m benchmarks.gpu_latency {' '.join(argv)}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"), **measured(options, backend),
    }  # fmt: skip
    file = result_file(options.model)
    file.write_text(json.dumps(found, indent=2) + "\n")
    write_charts(found, file)
    return 0


def main(argv: Sequence[str]) -> int:
    """Measure; returns the exit code."""
    return answered(lambda: _main(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
