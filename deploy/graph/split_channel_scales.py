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

from calib.tensor_scale import tensor_scale
from deploy.graph.constants import add_constant, insert_behind
from deploy.graph.names import constant_name, renamed_operator


def tensor_and_channel_scales(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(t, c) of shapes () and (N,) with c * t == `scales` (N,) in every bit, all in one dtype.

    t is that of `tensor_scale`, the smallest power of two that no scale exceeds, at most 1.
    """
    t = np.asarray(tensor_scale(float(scales.max())), scales.dtype)
    return t, scales / t


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

    It expects symmetric weights and the node names of deploy/graph/names.py. A weight keeps its scales if anything else
    reads it, or a Conv with a bias.
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
        for product, _ in weight.uses():
            insert_behind(product, "Mul", renamed_operator(product.name or "", "ChannelScale"), factors)
    RemoveUnusedNodesPass()(result)
    return ir.to_proto(result)
