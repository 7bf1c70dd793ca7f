"""The bridge: exports a torch network with Q/DQ operators to ONNX that TensorRT reads without changes.

A strongly typed engine takes its types from the graph, so the same network is exported twice: with FP16 types for
TensorRT (`model.onnx`) and with FP32 types for ONNX Runtime on a CPU (`model.fp32.onnx`), with the same integers and
scales.
"""

import ast
import copy
import io
import logging
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import opset21
from torch import Tensor, nn

from calib.errors import UserError
from calib.grids import why_not_int8
from calib.network.fp16_range import require_fp16_weights
from calib.network.qdq import SimulatedQuantizer  # the module defines the operators translated here, too
from deploy.graph.names import node_name, value_name
from deploy.graph.zero_points import with_zero_points

OPSET = 21  # has int8 Q/DQ with FP16 scales and native LayerNormalization/Gelu; newer ones give fused Attention nodes
op: Any = opset21  # its operators are typed for tracing functions, not for calls from translations
INPUT, OUTPUT = "input", "output"


def _write_quantize_dequantize(x: Any, scale: Any) -> Any:
    zero_point = op.Constant(value=ir.to_proto(ir.tensor(0, dtype=ir.DataType.INT8, name="zero_point")))
    return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), scale, zero_point)


def _write_dequantize_weight(q: Any, scale: Any, axis: int) -> Any:
    return op.DequantizeLinear(q, scale, axis=axis)


def _write_attention(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale=None,
    enable_gqa: bool = False,
):
    """Write softmax(q s^1/2 (k s^1/2)^T) v without shape arithmetic on k.

    The exporter's own form reshapes k by its run-time shape, which costs a TensorRT engine two more kernels per block and a
    separate fused-attention kernel for each. If the scores were scaled instead of q and k, a packed qkv would not run in
    INT8, because the compiler would move the slices into the weight.
    """
    if attn_mask is not None or is_causal or dropout_p or enable_gqa:
        raise UserError("attention with a mask, dropout or grouped queries cannot be exported yet")
    root = (scale if scale is not None else query.shape[-1] ** -0.5) ** 0.5
    root = op.CastLike(op.Constant(value_float=root), query)
    keys = op.Transpose(op.Mul(key, root), perm=[0, 1, 3, 2])
    return op.MatMul(op.Softmax(op.MatMul(op.Mul(query, root), keys), axis=-1), value)


TRANSLATION: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.scaled_dot_product_attention.default: _write_attention,
    torch.ops.int8.quantize_dequantize.default: _write_quantize_dequantize,
    torch.ops.int8.dequantize_weight.default: _write_dequantize_weight,
}


def _module_of(node: ir.Node) -> str:
    """Dotted name of the torch module that produced `node`, empty for the network itself.

    The exporter records scopes `['', 'a', 'a.b', operator]`.
    """
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    modules = [scope for scope in scopes[:-1] if scope and not scope.startswith("_")]
    return modules[-1] if modules else ""


def name_nodes(model: ir.Model) -> None:
    """Name every node and its outputs after its torch module, as deploy/graph/names.py says (edits `model`)."""
    seen: Counter[tuple[str, str]] = Counter()
    outputs = set(model.graph.outputs)
    for node in model.graph:
        key = _module_of(node), node.op_type
        node.name = node_name(*key, repeat=seen[key])
        seen[key] += 1
        for index, value in enumerate(node.outputs):
            if value not in outputs:
                value.name = value_name(node.name, index)


@contextmanager
def _quiet():
    """Suppress the progress that the exporter prints on stdout and stderr; errors are exceptions and still arrive."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)


def onnx_from_net(net: nn.Module, example: Tensor) -> onnx.ModelProto:
    """`net` as ONNX with a dynamic batch size; `example` (B >= 2, 3, H, W) determines shape and dtype.

    Raises UserError for a quantizer that only a simulation can compute; the message names it.
    """
    for module in net.modules():
        if isinstance(module, SimulatedQuantizer):
            raise UserError(
                f"quantizer '{module.quantizer}' has {why_not_int8(module.grid)}: it is simulated only, no INT8 kernel "
                f"of TensorRT reads it"
            )
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            net,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            custom_translation_table=TRANSLATION,
            verbose=False,
        )
    assert program is not None
    name_nodes(program.model)
    proto = program.model_proto
    for node in proto.graph.node:
        del node.metadata_props[:]
    return proto


def export_pair(net: nn.Module, size: tuple[int, int]) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """(`model.onnx` in FP16, `model.fp32.onnx`) of a quantized network; `size` is (height, width) of its input in pixels.

    Raises UserError if a weight or scale does not fit FP16.
    """
    return export_fp16(net, size), with_zero_points(export_float(net, size))


def export_fp16(net: nn.Module, size: tuple[int, int]) -> onnx.ModelProto:
    """`net` as ONNX with FP16 types, for an engine; `net` itself is not changed.

    Raises UserError if a weight or scale does not fit FP16.
    """
    require_fp16_weights(net)
    return onnx_from_net(copy.deepcopy(net).half(), torch.zeros(2, 3, *size).half())


def export_float(net: nn.Module, size: tuple[int, int]) -> onnx.ModelProto:
    """`net` as ONNX with FP32 types, for ONNX Runtime. That of the float network is the reference of fidelity and speed."""
    return onnx_from_net(net, torch.zeros(2, 3, *size))
