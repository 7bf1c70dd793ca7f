"""Splits per-channel weight scales of a product into one scale of the INT8 product and one factor per channel behind it.

    y = (q_x q_W) s_x s      scales s (N,), one per output channel: per column of the weight q_W (K, N) of a MatMul
      = (q_x q_W) s_x t c    t a power of two, c = s / t

TensorRT-RTX writes the result of an INT8 product in FP16. Given s, it multiplies by s_x s in a later kernel: what it
writes is the integer sum, and five products of 127 x 127 exceed 65504, the largest FP16 number. Given t, it multiplies the
INT32 sum by s_x t in float before it rounds to FP16, and the kernel that adds the bias multiplies by c: the number of
kernels does not change. A convolution writes FP32 given s and FP16 given t, half the bytes; only one without a bias is
edited, because the factors have to come before it (deploy/graph/separate_biases.py).

Products that read the same tensor get the same t, the largest of theirs: the compiler merges such products into one kernel
(q, k and v; a layer and the branch beside it), but only if s_x t is the same for all.
"""

from collections import defaultdict

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from deploy.graph.constants import add_constant
from deploy.graph.names import constant_name, renamed_operator


def tensor_and_channel_scales(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(t, c) of shapes () and (N,) with c * t == `scales` (N,) in every bit, all in one dtype.

    t is the smallest power of two that no scale exceeds, so that c is at most 1 and as far from subnormal as possible.
    If a scale exceeds 1, t is 1: a larger divisor could lose bits of a small scale.
    """
    mantissa, exponent = np.frexp(scales.max())  # scale = mantissa * 2^exponent, 0.5 <= mantissa < 1
    t = np.ldexp(scales.dtype.type(1), min(exponent - int(mantissa == 0.5), 0))
    return np.asarray(t), scales / t


def _output_axis(node: ir.Node) -> int | None:
    """The axis of the output channels in the weight that `node` dequantizes for MatMuls or Convs without a bias alone."""
    users = {(user.op_type, index, len(user.inputs)) for user, index in node.outputs[0].uses()}
    return {frozenset({("MatMul", 1, 2)}): 1, frozenset({("Conv", 1, 2)}): 0}.get(frozenset(users))


def _channel_scales(node: ir.Node) -> np.ndarray | None:
    """The scales (N,) of a `node` that dequantizes a weight per output channel of products alone; None for any other."""
    if node.op_type != "DequantizeLinear" or node.outputs[0].is_graph_output():
        return None
    weight, scale = (ir.convenience.get_const_tensor(value) for value in node.inputs[:2] if value is not None)
    if weight is None or scale is None or weight.dtype is not ir.DataType.INT8:
        return None
    axis, rank = _output_axis(node), len(weight.shape)
    if axis is None or len(scale.shape) != 1 or (axis == 1 and rank != 2):
        return None
    written = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    return scale.numpy() if written % rank == axis else None


def _multiply_behind(graph: ir.Graph, matmul: ir.Node, factors: ir.Value) -> None:
    product = matmul.outputs[0]
    name = renamed_operator(matmul.name or "", "ChannelScale")
    scaled = ir.Value(name=name, shape=product.shape, type=product.type)
    if product.is_graph_output():
        product.name, scaled.name = matmul.name, product.name
    product.replace_all_uses_with(scaled, replace_graph_outputs=True)
    graph.insert_after(matmul, ir.node("Mul", [product, factors], outputs=[scaled], name=name))


def _tensor_scales(scales: dict[ir.Node, np.ndarray]) -> dict[ir.Node, np.ndarray]:
    """t () of each dequantized weight in `scales`; weights whose products read the same tensor share one."""
    found = {node: tensor_and_channel_scales(values)[0] for node, values in scales.items()}
    readers = defaultdict(list)
    for node in scales:
        for matmul, _ in node.outputs[0].uses():
            readers[matmul.inputs[0]].append(node)
    for nodes in readers.values():
        largest = max(found[node] for node in nodes)
        found.update(dict.fromkeys(nodes, largest))
    return found


def split_channel_scales(model: onnx.ModelProto) -> onnx.ModelProto:
    """A new model with a Mul `<layer>/ChannelScale` behind each `<layer>/MatMul` or Conv by a per-channel INT8 weight.

    It expects symmetric weights and the node names of deploy/graph/names.py. A weight with another reader than the
    right factor of MatMuls keeps its scales.
    """
    result = ir.from_proto(model)
    graph = result.graph
    scales = {node: found for node in graph if (found := _channel_scales(node)) is not None}
    for node, t in _tensor_scales(scales).items():
        weight = node.outputs[0]
        node.resize_inputs(2)  # zero points would keep their shape (N,)
        node.replace_input_with(1, add_constant(graph, constant_name(weight.name or "", "scale"), t))
        node.attributes.pop("axis", None)
        channels = scales[node] / t
        if (rank := len(node.inputs[0].shape)) > 2:  # type: ignore[union-attr, arg-type]
            channels = channels.reshape(1, -1, *[1] * (rank - 2))
        factors = add_constant(graph, constant_name(weight.name or "", "channel_scale"), channels)
        for matmul, _ in weight.uses():
            _multiply_behind(graph, matmul, factors)
    RemoveUnusedNodesPass()(result)
    return ir.to_proto(result)
