"""The audit: does an INT8 kernel run each layer that the ONNX graph plans for INT8?

The plan is the Q/DQ nodes of the graph, the evidence is the kernels of the engine. They are compared by node name, not by
number: one kernel may cover several layers (q, k and v as one GEMM), and attention adds GEMMs without weights.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnx

from deploy.engine.kernels import Kernel, count_kernels
from deploy.errors import ContractError
from deploy.graph.names import require_unique

_LAYER_OPS = ("MatMul", "Gemm", "Conv")
_SHOWN = 5  # lost layers named in a message


@dataclass(frozen=True)
class Audit:
    """The numbers of kernels by the type they multiply, and the planned layers that no INT8 kernel runs.

    `kernels`: the number of all kernels. `int8_attention`: how many of the `fused_attention` have q, k and v in INT8.
    `casts`: kernels that only change types. `unproven`: GEMMs and convolutions whose factors have no readable type.
    `planned`: the number of layers planned for INT8. `lost`: the ONNX node names of those that no INT8 kernel runs;
    `lost_attention`: the names of the lost products inside attentions.
    """

    kernels: int
    int8_gemms: int
    fp16_gemms: int
    fp32_gemms: int
    int8_convs: int
    fp16_convs: int
    fp32_convs: int
    fused_attention: int
    int8_attention: int
    casts: int
    unproven: int
    planned: int
    lost: tuple[str, ...]
    lost_attention: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The audit as plain values, for report and manifest."""
        return asdict(self) | {"lost": list(self.lost), "lost_attention": list(self.lost_attention)}

    def summary(self) -> str:
        """The audit in one line."""
        done = self.planned - len(self.lost)
        parts = [
            f"{done} of {self.planned} planned layers have a kernel with INT8 operands "
            f"({self.int8_gemms} GEMMs, {self.int8_convs} convolutions)",
            f"{self.fused_attention} fused attention kernels, {self.int8_attention} of them in INT8",
            f"{self.fp16_gemms} FP16 GEMMs and {self.fp16_convs} FP16 convolutions",
            f"{self.fp32_gemms} FP32 GEMMs and {self.fp32_convs} FP32 convolutions",
            *([f"{self.unproven} GEMMs or convolutions of unknown type"] if self.unproven else []),
            f"{self.kernels} kernels",
        ]
        return "; ".join(parts)


class _Graph:
    """The producers of all tensors of a graph, to follow a tensor to its origin."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.producers = {output: node for node in graph.node for output in node.output}
        self.int8 = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8}

    def origin(self, tensor: str, through: tuple[str, ...]) -> onnx.NodeProto | None:
        """The first node upstream of `tensor` whose operator is not one of `through`."""
        node = self.producers.get(tensor)
        while node is not None and node.op_type in through:
            node = self.producers.get(node.input[0])
        return node

    def is_quantized_activation(self, tensor: str) -> bool:
        layout = ("Reshape", "Transpose")
        dequantize = self.origin(tensor, layout)
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            return False
        quantize = self.origin(dequantize.input[0], layout)
        return quantize is not None and quantize.op_type == "QuantizeLinear"

    def is_int8_weight(self, tensor: str) -> bool:
        dequantize = self.origin(tensor, ("Transpose",))
        return dequantize is not None and dequantize.op_type == "DequantizeLinear" and dequantize.input[0] in self.int8


def planned_layers(model: onnx.ModelProto) -> tuple[str, ...]:
    """The names of the MatMul, Gemm and Conv nodes with a quantized activation and an INT8 weight, in graph order.

    The activation is QuantizeLinear -> DequantizeLinear, the weight DequantizeLinear of an INT8 initializer;
    Reshape (activations only) and Transpose may lie between. Raises UserError if such a node has no name of its own.
    """
    graph = _Graph(model.graph)
    names = [
        node.name
        for node in model.graph.node
        if node.op_type in _LAYER_OPS
        and graph.is_quantized_activation(node.input[0])
        and graph.is_int8_weight(node.input[1])
    ]
    return require_unique(model, names)


def planned_attention(model: onnx.ModelProto) -> tuple[str, ...]:
    """The names of the MatMul nodes of two quantized activations, in graph order: q k^T and P v of each INT8 attention.

    Raises UserError if such a node has no name of its own.
    """
    graph = _Graph(model.graph)
    names = [
        node.name
        for node in model.graph.node
        if node.op_type == "MatMul" and all(graph.is_quantized_activation(factor) for factor in node.input)
    ]
    return require_unique(model, names)


def _covered(kernels: Iterable[Kernel], *kinds: str) -> set[str]:
    whole = (kernel.layers for kernel in kernels if kernel.kind in kinds and kernel.precision == "int8")
    return {layer for layers in whole for layer in layers}


def audit(kernels: Sequence[Kernel], planned: Iterable[str], attention: Iterable[str] = ()) -> Audit:
    """Count `kernels` by the type they multiply, and find the `planned` ONNX nodes that no kernel runs in INT8.

    `attention`: the names of the products of activations, which only a fused INT8 attention kernel may run.
    """
    unknown = [kernel for kernel in kernels if kernel.kind in ("gemm", "conv") and kernel.precision == "unknown"]
    covered, fused = _covered(kernels, "gemm", "conv"), _covered(kernels, "attention")
    covered |= {layer for kernel in kernels for layer in kernel.int8_layers}
    planned = tuple(planned)
    wanted = {*planned}  # a layer that stays in float has the FP16 types of the graph, which is checked before
    return Audit(
        kernels=len(kernels),
        int8_gemms=count_kernels(kernels, "gemm", "int8") + sum(bool(kernel.int8_layers) for kernel in kernels),
        fp16_gemms=count_kernels(kernels, "gemm", "fp16"),
        fp32_gemms=count_kernels(kernels, "gemm", "fp32"),
        int8_convs=count_kernels(kernels, "conv", "int8"),
        fp16_convs=count_kernels(kernels, "conv", "fp16"),
        fp32_convs=count_kernels(kernels, "conv", "fp32"),
        fused_attention=sum(kernel.kind == "attention" for kernel in kernels),
        int8_attention=count_kernels(kernels, "attention", "int8"),
        casts=sum(kernel.kind == "cast" for kernel in kernels),
        unproven=sum(not kernel.layers or not wanted.isdisjoint(kernel.layers) for kernel in unknown),
        planned=len(planned),
        lost=tuple(layer for layer in planned if layer not in covered),
        lost_attention=tuple(product for product in attention if product not in fused),
    )


def _faults(result: Audit, half: bool) -> list[str]:
    faults = []
    if not result.planned:
        faults.append("the ONNX graph plans no layer for INT8; export it with Q/DQ nodes")
    if result.lost:
        shown = ", ".join(result.lost[:_SHOWN]) + (", .." if len(result.lost) > _SHOWN else "")
        faults.append(
            f"{len(result.lost)} of {result.planned} planned layers do not run in an INT8 kernel: {shown}; "
            "check that both inputs of each are dequantized INT8 and that nothing slices its output, or "
            "build for another target"
        )
    if result.lost_attention:
        faults.append(
            f"{len(result.lost_attention)} products of INT8 attentions do not run in a fused INT8 attention kernel: "
            f"{', '.join(result.lost_attention[:_SHOWN])}; check head size (16, 32, 64) and tokens (at most 512), or use "
            "a recipe without [attention]"
        )
    if half and (result.fp32_gemms or result.fp32_convs):
        faults.append(
            f"{result.fp32_gemms} GEMMs and {result.fp32_convs} convolutions run in FP32: export weights, "
            "scales and activations as FP16"
        )
    if result.unproven:
        faults.append(
            f"{result.unproven} kernels that run planned layers, or name none, multiply numbers of an unknown type: build "
            "with the version of TensorRT in requirements.txt, whose engines can be read"
        )
    return faults


def require_int8(result: Audit, every: bool = True, half: bool = True) -> None:
    """Raise ContractError unless every planned layer runs in INT8 and nothing is multiplied in FP32.

    It is also raised if no layer is planned, or if the type of a GEMM or convolution cannot be read. Unless `every`: only
    if none runs in INT8. Unless `half`: other layers may be multiplied in FP32.
    """
    if not every and result.planned:
        if len(result.lost) == result.planned:
            raise ContractError(
                f"ONNX Runtime computes none of the {result.planned} planned layers in integers on this processor: a "
                f"convolution only where a quantizer follows it directly, or 1 x 1"
            )
        return
    if faults := _faults(result, half):
        raise ContractError("the engine is not INT8 as planned: " + "; ".join(faults))
