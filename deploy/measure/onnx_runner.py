"""Runs ONNX graphs with ONNX Runtime on the CPU, which has INT8 kernels for the FP32-typed Q/DQ graph."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from deploy.measure.ort_options import ort_options

Given = np.ndarray | Mapping[str, np.ndarray]  # images (B, 3, H, W), or named inputs (B, ...)
FLOATS = {"tensor(float16)": np.float16, "tensor(float)": np.float32}
THREADS = 2  # fixed, so that results do not depend on the number of cores


def first(given: Given, count: int) -> Given:
    """Return the first `count` samples of `given`."""
    return given[:count] if isinstance(given, np.ndarray) else {name: array[:count] for name, array in given.items()}


def count_samples(given: Given) -> int:
    """The number of samples of `given`."""
    return len(given if isinstance(given, np.ndarray) else next(iter(given.values())))


def readable(path: Path) -> str | bytes:
    """Return the path as ONNX Runtime reads it whatever the locale; the content of a file whose path is no UTF-8."""
    try:
        return os.fsencode(path).decode()
    except UnicodeDecodeError:
        return path.read_bytes()


class OnnxRunner:
    """A session for one graph: `runner(given)` is its first output as float32.

    `given`: images (B, 3, H, W), or the inputs by name; floating ones are float32, whatever the type of the graph.
    `fused=False` runs the graph node by node, without the optimizations of ONNX Runtime.
    """

    def __init__(self, model: Path | bytes, fused: bool = True, threads: int = THREADS) -> None:
        import onnxruntime as ort

        options = ort_options(threads)
        if not fused:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        source = readable(model) if isinstance(model, Path) else model
        self.session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self.inputs = self.session.get_inputs()

    def __call__(self, given: Given) -> np.ndarray:
        """The first output, (B, D) float32."""
        return next(iter(self.named_outputs(given).values())).astype(np.float32)

    def named_outputs(self, given: Given) -> dict[str, np.ndarray]:
        """Every graph output by name, in the graph's types."""
        arrays = {self.inputs[0].name: given} if isinstance(given, np.ndarray) else given
        fed = {
            each.name: arrays[each.name].astype(FLOATS.get(each.type, arrays[each.name].dtype)) for each in self.inputs
        }
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, fed), strict=True))
