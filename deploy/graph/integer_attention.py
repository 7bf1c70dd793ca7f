"""Rewrites the products of queries, keys and values and the attention behind them into ONNX Runtime's QAttention.

softmax(q k^T / sqrt(width)) v of q, k, v = x W + b with integers x and W: one kernel, which multiplies the integers, writes
the heads where the attention reads them and computes that in FP32. It is exact but for the order of FP32 operations, and in
every bit where all factors are powers of two. Any other factor of the scores goes into the scales and biases. Attention with
a mask or a bias, and queries that are normalized or rotated, stay as they are.
"""

import math
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import onnx_ir as ir

from deploy.graph.constants import add_constant, constant
from deploy.graph.integer_factors import Factors, factors, only_user, zero_point
from deploy.graph.integer_operators import ATTENTION, BETWEEN, MICROSOFT
from deploy.graph.moved_channels import SCALES, data_input, heads, heads_joined
from deploy.graph.names import constant_name
from deploy.graph.writer import Writer
from deploy.graph.writer import replace as replace_value


@dataclass(frozen=True)
class _Attention:
    """softmax(`scale` q k^T) v: the values q, k^T and v, and the MatMul that returns it."""

    query: ir.Value
    transposed_key: ir.Value
    value: ir.Value
    average: ir.Node
    scale: float


@dataclass(frozen=True)
class _Projection:
    """x W + b of one of q, k and v by the MatMul `node`; its channels and `bias` are in the order (heads, width)."""

    node: ir.Node
    product: Factors
    bias: np.ndarray
    heads: int
    width: int

    def times(self, number: float) -> "_Projection":
        """The same with every channel times `number`."""
        scale = self.product.weight_scale * np.float32(number)
        return replace(self, product=replace(self.product, weight_scale=scale), bias=self.bias * np.float32(number))


def _unscaled(value: ir.Value) -> tuple[ir.Value, float] | None:
    """(what is multiplied by constant numbers to give `value`, their product); None if something else reads it as well."""
    scale = 1.0
    while (node := value.producer()) is not None and node.op_type in SCALES:
        before, numbers = data_input(node), [each for each in map(constant, node.inputs) if each is not None]
        if before is None or numbers[0].size != 1 or only_user(before) is not node:
            return None
        value, number = before, float(numbers[0].item())
        scale = scale * number if node.op_type == "Mul" else scale / number
    return value, scale


def _attention(softmax: ir.Node) -> _Attention | None:
    """The attention around `softmax`; None if anything but a factor lies between its products."""
    axis = softmax.attributes["axis"].as_int() if "axis" in softmax.attributes else -1
    average, weights = only_user(softmax.outputs[0]), softmax.inputs[0]
    found = None if weights is None or axis not in (-1, 3) else _unscaled(weights)
    if found is None or average is None or average.op_type != "MatMul" or average.inputs[0] is not softmax.outputs[0]:
        return None
    scores = found[0].producer()
    if scores is None or scores.op_type != "MatMul" or only_user(found[0]) is None:
        return None
    query, key, value = *scores.inputs, average.inputs[1]
    return _Attention(query, key, value, average, found[1]) if query and key and value else None


def _projection(value: ir.Value, transposed: bool = False) -> _Projection | None:
    """What computes the heads `value`; None if it is not channels of x W + b, times one number."""
    found = heads(value, transposed)
    node = None if found is None else found.source.producer()
    if node is not None and node.op_type == "Add":
        before = (each.producer() for each in node.inputs if each is not None)
        node = next((each for each in before if each is not None and each.op_type == "MatMul"), None)
    product = factors(node) if node is not None and node.op_type == "MatMul" else None
    if found is None or node is None or product is None or product.output is not found.source:
        return None
    channels = found.channels.ravel()
    bias = np.zeros(len(channels), np.float32) if product.bias is None else product.bias.astype(np.float32)[channels]
    chosen = replace(product, weight=product.weight[:, channels], weight_scale=product.weight_scale[channels])
    return _Projection(node, chosen, bias, *found.channels.shape).times(found.scale)


def _read_the_same(one: Factors, other: Factors) -> bool:
    """Whether both multiply the same integers with the same scale."""
    scale, others = constant(one.x_scale), constant(other.x_scale)
    return one.x is other.x and scale is not None and others is not None and np.array_equal(scale, others)


def as_attention(softmax: ir.Node) -> bool:
    """Write the attention around `softmax` and the products of its q, k and v as QAttention; False if it is another."""
    found = _attention(softmax)
    if found is None:
        return False
    query, key, value = _projection(found.query), _projection(found.transposed_key, True), _projection(found.value)
    if query is None or key is None or value is None:
        return False
    shape, output = found.average.outputs[0].shape, None
    if shape is not None and isinstance(shape[2], int):
        output = heads_joined(found.average.outputs[0], query.heads, shape[2], query.width)
    alike = (query.heads, query.width) == (key.heads, key.width) == (value.heads, value.width)
    if output is None or not alike or not all(_read_the_same(query.product, each.product) for each in (key, value)):
        return False
    factor = found.scale * math.sqrt(query.width)  # QAttention divides the scores by sqrt(width)
    parts = query.times(factor), key, value
    write = Writer(found.average, BETWEEN.join(dict.fromkeys(str(each.node.name) for each in parts)))
    others = {node.name for node in write.graph if node.op_type == ATTENTION}  # several may read one projection
    name = next(each for index in count() if (each := write.name_of(ATTENTION, index)) not in others)
    # constants of its own: a product that is left of the same projection has the scales and the order of the graph
    own = {
        "weight": np.concatenate([each.product.weight for each in parts], axis=1),
        "bias": np.concatenate([each.bias for each in parts]),
        "weight_scale": np.concatenate([each.product.weight_scale for each in parts]),
    }
    weight, bias, scale = (add_constant(write.graph, constant_name(name, role), array) for role, array in own.items())
    inputs = [query.product.x, weight, bias, query.product.x_scale, scale, None, zero_point(write.graph)]
    replace_value(output, write.node(ATTENTION, inputs, MICROSOFT, name, num_heads=query.heads))
    return True
