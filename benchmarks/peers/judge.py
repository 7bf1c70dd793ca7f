"""Judges a quantized ONNX file of any tool against the float one, in ONNX Runtime on this CPU.

It is a process of its own, because a file of another tool may crash the process that runs it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calib.task import Task
from deploy.measure.accuracy import fidelity
from deploy.measure.latency import compare
from deploy.measure.ort_options import ort_options

FIDELITY_BATCH = 16  # images per run while fidelity is measured
SPEED_BATCH, THREADS = 8, 2  # fixed, so that results do not depend on the number of cores


SIGNED = "session.qdqisint8allowed"  # x86 sessions turn signed INT8 activations into unsigned ones without it


class Network:
    """A session on the CPU. `note` names the options that it needed beyond the defaults."""

    def __init__(self, path: Path, threads: int = THREADS) -> None:
        import onnxruntime as ort
        from onnxruntime.capi.onnxruntime_pybind11_state import Fail

        options = ort_options(threads)
        providers = ["CPUExecutionProvider"]
        self.note: str | None = None
        try:
            self.session = ort.InferenceSession(str(path), options, providers=providers)
        except Fail:  # 1.31.1 loses `output_dtype` when it turns a QuantizeLinear that it added into an unsigned one
            options.add_session_config_entry(SIGNED, "1")
            self.session = ort.InferenceSession(str(path), options, providers=providers)
            self.note = f"ONNX Runtime loads it with {SIGNED}=1 only"
        self.input = self.session.get_inputs()[0].name

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The first output."""
        return self.session.run(None, {self.input: images})[0]

    def outputs(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """The first output for all `images`, which run in batches."""
        batches = (images[start : start + FIDELITY_BATCH] for start in range(0, len(images), FIDELITY_BATCH))
        return {"output": np.concatenate([self(batch) for batch in batches])}


def judge(float_model: Path, quantized: Path, images: np.ndarray, task: Task) -> dict[str, Any]:
    """{`fidelity` on all `images` (float32 (N, 3, H, W)), `speed` of both in turn on the first eight, `note`}."""
    reference, candidate = Network(float_model), Network(quantized)
    batch = np.ascontiguousarray(images[:SPEED_BATCH])
    return {
        "fidelity": fidelity(reference.outputs(images), candidate.outputs(images), task).to_json(),
        "speed": compare(lambda: reference(batch), lambda: candidate(batch)).to_json(),
        "note": candidate.note,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the verdict as one line of JSON; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.judge")
    for name in ("float_model", "quantized", "images"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--task", required=True, help="what the outputs are (deploy/measure/tasks)")
    args = parser.parse_args(argv)
    print(json.dumps(judge(args.float_model, args.quantized, np.load(args.images, mmap_mode="r"), Task(args.task))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
