"""The factors of INT8 products in a Q/DQ graph, as the integer kernels of ONNX Runtime read them.

These multiply unsigned activations by signed weights, so the integers q of an activation become q + 128 with zero point
128: the same numbers.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from deploy.graph.constants import DEQUANTIZE, QUANTIZE, add_constant, constant

OFFSET = 128


@dataclass(frozen=True)
class Factors:
    """The integers `x` (uint8) and `weight` (int8) that a node multiplies, and their scales.

    `x_scale`: the initializer (), `weight_scale` (N,) one per output channel. `bias` (N,) or None; `output`: the sum.
    """

    x: ir.Value
    x_scale: ir.Value
    weight: np.ndarray
    weight_scale: np.ndarray
    bias: np.ndarray | None
    output: ir.Value


def zero_point(graph: ir.Graph) -> ir.Value:
    """The zero point of an activation q + 128."""
    return add_constant(graph, "unsigned_zero_point", np.array(OFFSET, np.uint8))


def only_user(value: ir.Value) -> ir.Node | None:
    """The node that alone reads `value`; None if there are others, or if the graph returns it."""
    users = list(value.uses())
    return users[0].node if len(users) == 1 and not value.is_graph_output() else None


def made_unsigned(value: ir.Value | None) -> bool:
    """Whether `value`, which were integers q, is now q + 128 (edits the graph).

    It can be where a QuantizeLinear writes it and DequantizeLinears alone read it.
    """
    if value is None or value.dtype is ir.DataType.UINT8:
        return value is not None
    quantize, users = value.producer(), [user for user, _ in value.uses()]
    if quantize is None or quantize.op_type != QUANTIZE or value.is_graph_output():
        return False
    scale = constant(quantize.inputs[1])
    if scale is None or scale.size > 1 or any(user.op_type != DEQUANTIZE for user in users):
        return False
    assert quantize.graph is not None
    for node in (quantize, *users):
        node.attributes.pop("output_dtype", None)
        node.resize_inputs(3)
        node.replace_input_with(2, zero_point(quantize.graph))
    value.type = ir.TensorType(ir.DataType.UINT8)
    return True


def _with_bias(node: ir.Node, channels: int) -> tuple[np.ndarray | None, ir.Value]:
    """(bias (N,), the value that holds the sum): the third input of `node`, or what an Add behind it adds."""
    output = node.outputs[0]
    own = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    add = only_user(output)
    if own is not None or add is None or add.op_type != "Add":
        return own, output
    other = add.inputs[1] if add.inputs[0] is output else add.inputs[0]
    bias = constant(other)
    per_channel = ((channels, 1, 1), (1, channels, 1, 1)) if node.op_type == "Conv" else ((channels,), (1, channels))
    if bias is None or bias.shape not in per_channel:
        return None, output
    return bias.ravel(), add.outputs[0]


def _zero_point_is(dequantize: ir.Node, expected: int) -> bool:
    """Whether the zero point of a DequantizeLinear, 0 where it has none, is this number in every channel."""
    given = dequantize.inputs[2] if len(dequantize.inputs) > 2 else None
    found = np.zeros(1) if given is None else constant(given)
    return found is not None and bool((found == expected).all())


def factors(node: ir.Node) -> Factors | None:
    """What the MatMul or Conv `node` reads, if these are quantized activations and INT8 weights; None otherwise.

    Makes the activations unsigned (edits the graph).
    """
    x, weight = (None if value is None else value.producer() for value in node.inputs[:2])
    if x is None or weight is None or x.op_type != DEQUANTIZE or weight.op_type != DEQUANTIZE:
        return None
    integers, scale = constant(weight.inputs[0]), constant(weight.inputs[1])
    if integers is None or scale is None or integers.dtype != np.int8 or not _zero_point_is(weight, 0):
        return None
    if not _zero_point_is(x, OFFSET if x.inputs[0] is not None and x.inputs[0].dtype is ir.DataType.UINT8 else 0):
        return None
    axis = 0 if node.op_type == "Conv" else 1
    along = "axis" in weight.attributes and weight.attributes["axis"].as_int() % integers.ndim == axis
    if integers.ndim != (4 if node.op_type == "Conv" else 2) or not (scale.size == 1 or along):
        return None
    if not made_unsigned(x.inputs[0]):
        return None
    scales = np.broadcast_to(scale.ravel(), integers.shape[axis]).astype(np.float32)
    assert x.inputs[0] is not None
    assert x.inputs[1] is not None
    return Factors(x.inputs[0], x.inputs[1], integers, scales, *_with_bias(node, len(scales)))
