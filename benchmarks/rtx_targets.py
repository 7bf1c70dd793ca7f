"""`python -m benchmarks.rtx_targets GRAPH.onnx`: which engines of TensorRT-RTX this machine's GPU takes.

The FP16-typed graph is built without an architecture, for the GPU of this machine (CURRENT) and for each that the library
knows. Recorded is what the library says of each engine: its validity, whether it loads, and what it computes beside ONNX
Runtime. Every build is a process of its own. Results: benchmarks/results/rtx_targets.json.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from calib.errors import UserError
from deploy import host
from deploy.cli import Parser, answered
from deploy.engine.architectures import RTX_SMS
from deploy.engine.backends import tensorrt_rtx
from deploy.engine.build import Profile, serialize_network
from deploy.engine.isolated import CrashError, isolated
from deploy.engine.logger import first_error, keeping_logger
from deploy.engine.runner import EngineRunner
from deploy.gpu import why_no_gpu
from deploy.measure.accuracy import sqnr_db
from deploy.measure.onnx_runner import OnnxRunner
from deploy.report.evidence import tool_commit

RESULT = Path(__file__).parent / "results/rtx_targets.json"
TARGETS = ("none", "CURRENT", *(f"SM{sm}" for sm in RTX_SMS))
IMAGES = 4


def measure(graph: str, target: str) -> dict[str, Any]:
    """Build `graph` for `target`, and try to load and run it; what was found, as plain values."""
    import tensorrt_rtx as trt

    def configure(config: Any) -> None:
        if target != "none":
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)

    plan, _ = serialize_network(trt, Path(graph).read_bytes(), Profile(), configure)
    logger = keeping_logger(trt)
    validity, bits = trt.Runtime(logger).get_engine_validity(plan)
    found: dict[str, Any] = {"validity": str(validity).rpartition(".")[2], "diagnostics": int(bits)}
    if trt.Runtime(logger).deserialize_cuda_engine(plan) is None:
        return found | {"loads": False, "said": first_error(logger)}
    with EngineRunner(plan, trt) as run:
        ((name, tensor),) = run.tensors.inputs.items()
        images = np.random.default_rng(0).normal(size=(IMAGES, *tensor.shape)).astype(tensor.dtype)
        own = next(iter(run({name: images}).values()))
    reference = next(iter(OnnxRunner(Path(graph), fused=False).named_outputs({name: images}).values()))
    return found | {"loads": True, "sqnr_to_onnx_runtime_db": sqnr_db(reference, own.astype(np.float32))}


def _tried(graph: str, target: str) -> dict[str, Any]:
    try:
        return {"target": target, **isolated(measure, graph, target)}
    except (UserError, CrashError) as error:
        return {"target": target, "said": str(error)}


def _main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.rtx_targets", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph", help="model.onnx of a package that takes images")
    args = parser.parse_args(argv)
    if reason := why_no_gpu():
        raise UserError(f"nothing can be tried here: {reason}")
    rows = []
    for target in TARGETS:
        rows.append(_tried(args.graph, target))
        print(json.dumps(rows[-1]), flush=True)
    found = {
        "version": tensorrt_rtx.version(), "machine": host.describe(), "rows": rows,
        "commit": tool_commit(), "command": f"python -m benchmarks.rtx_targets {' '.join(argv)}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    RESULT.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def main(argv: Sequence[str]) -> int:
    """Measure; returns the exit code."""
    return answered(lambda: _main(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
