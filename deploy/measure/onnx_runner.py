"""Runs ONNX graphs with ONNX Runtime on the CPU, which has INT8 kernels for the FP32-typed Q/DQ graph."""

import os
from pathlib import Path

import numpy as np

from deploy.measure.ort_options import ort_options

THREADS = 2  # fixed, so that results do not depend on the number of cores


def readable(path: Path) -> str | bytes:
    """Return the path as ONNX Runtime reads it whatever the locale; the content of a file whose path is no UTF-8."""
    try:
        return os.fsencode(path).decode()
    except UnicodeDecodeError:
        return path.read_bytes()


class OnnxRunner:
    """A session for one graph: `runner(images)` is its first output as float32.

    `images` is float32 (B, 3, H, W), whatever the type of the graph. `fused=False` runs the graph node by node, without
    the optimizations of ONNX Runtime.
    """

    def __init__(self, model: Path | bytes, fused: bool = True, threads: int = THREADS) -> None:
        import onnxruntime as ort

        options = ort_options(threads)
        if not fused:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        source = readable(model) if isinstance(model, Path) else model
        self.session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0]
        self.dtype = np.float16 if self.input.type == "tensor(float16)" else np.float32

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The first output, (B, D) float32."""
        return next(iter(self.named_outputs(images).values())).astype(np.float32)

    def named_outputs(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Every graph output by name, in the graph's types."""
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, {self.input.name: images.astype(self.dtype)}), strict=True))
