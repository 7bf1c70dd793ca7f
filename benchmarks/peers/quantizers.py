"""The calls of the other tools: each quantizes in a process and with an interpreter of its own.

All quantize to signed symmetric INT8 with weights per channel, and write Q/DQ nodes with FP32 types around them: a TensorRT
engine needs that, and ONNX Runtime can judge it. Everything else is the default of the tool.
"""

import argparse
import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import onnx

NOT_INSTALLED = 4  # exit code
LAYERS = ("MatMul", "Gemm", "Conv")


class OneByOne:
    """A calibration reader for ONNX Runtime: one image per step, read from a memory-mapped file."""

    def __init__(self, images: "np.ndarray", input_name: str) -> None:
        self.feeds: Iterator[dict[str, np.ndarray]] = ({input_name: image[None]} for image in images)

    def get_next(self) -> "dict[str, np.ndarray] | None":
        """The inputs of the next step, None at the end."""
        return next(self.feeds, None)


def activation_products(model: "onnx.ModelProto") -> list[str]:
    """The names of the MatMul nodes without a constant input: the two products of each attention."""
    graph = model.graph
    constant = {tensor.name for tensor in graph.initializer}
    constant |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    return [node.name for node in graph.node if node.op_type == "MatMul" and constant.isdisjoint(node.input)]


def quantize_with_onnxruntime(
    calibration: str, linears_only: bool, float_model: Path, images: Path, quantized: Path
) -> None:
    """Quantize with `quant_pre_process` and `quantize_static`, the products and convolutions alone.

    calibration: minmax, entropy or percentile (99.999). The outputs of all layers for all images stay in memory.
    """
    import numpy as np
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    methods = {
        "minmax": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }
    prepared = quantized.with_name("prepared.onnx")
    quant_pre_process(float_model, prepared)
    model = onnx.load(prepared)
    quantize_static(
        prepared,
        quantized,
        OneByOne(np.load(images, mmap_mode="r"), model.graph.input[0].name),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(LAYERS),
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=activation_products(model) if linears_only else [],
        calibrate_method=methods[calibration],
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "CalibTensorRangeSymmetric": True,
            "CalibPercentile": 99.999,
        },
    )


def quantize_with_modelopt(
    calibration: str, linears_only: bool, float_model: Path, images: Path, quantized: Path
) -> None:
    """Quantize with the ONNX path of NVIDIA Model Optimizer on the CPU. calibration: max or entropy."""
    import numpy as np
    from modelopt.onnx.quantization import quantize

    quantize(
        str(float_model),
        quantize_mode="int8",
        calibration_data=np.load(images),
        calibration_method=calibration,
        calibration_eps=["cpu"],
        disable_mha_qdq=linears_only,
        high_precision_dtype="fp32",
        output_path=str(quantized),
        log_level="WARNING",
    )


@dataclass(frozen=True)
class Tool:
    """A peer: the package whose version is reported, the module that quantizes, and the calibrations it offers."""

    package: str
    module: str
    quantize: Callable[[str, bool, Path, Path, Path], None]
    calibrations: tuple[str, ...]


TOOLS = {
    "onnxruntime": Tool(
        "onnxruntime", "onnxruntime.quantization", quantize_with_onnxruntime, ("minmax", "entropy", "percentile")
    ),
    "modelopt": Tool("modelopt", "modelopt.onnx.quantization", quantize_with_modelopt, ("max", "entropy")),
}


def _versions(names: Sequence[str]) -> dict[str, str]:
    loaded = {name: sys.modules[name] for name in names if name in sys.modules}
    return {name: getattr(module, "__version__", "unknown") for name, module in loaded.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Quantize once; returns the exit code. The last line on stdout is JSON: `version`, `packages`, `seconds`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.quantizers")
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("calibration")
    for name in ("float_model", "images", "quantized"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--linears-only", action="store_true", help="leave the products of attention in float")
    args = parser.parse_args(argv)
    tool = TOOLS[args.tool]
    if importlib.util.find_spec(tool.package) is None:
        return NOT_INSTALLED
    importlib.import_module(tool.module)
    start = time.perf_counter()
    tool.quantize(args.calibration, args.linears_only, args.float_model, args.images, args.quantized)
    found: dict[str, Any] = {"seconds": time.perf_counter() - start}
    packages = _versions((tool.package, "onnx", "onnxruntime", "numpy"))
    print(json.dumps(found | {"version": packages[tool.package], "packages": packages}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
