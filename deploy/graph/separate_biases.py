"""Biases that ONNX Runtime's default session does not round: an Add of its own behind each convolution with INT8 weights.

    y = conv(x s_x, W s_W) + b        ONNX Runtime makes of b the INT32 round(b / (s_x s_W)), in the type of the graph

It does so for every Conv and Gemm between a DequantizeLinear and a QuantizeLinear (its optimizer `WeightBiasQuantization`).
In FP16 the quotient overflows beyond 65504 and s_x s_W is subnormal or zero, so the network is no longer itself. In FP32 the
INT32 overflows where a channel's weights are tiny and its bias is not. ONNX Runtime leaves two forms alone, which
TensorRT-RTX builds to as many kernels: a Conv without a bias and an Add behind it, and a bias of two dimensions behind a
MatMul, which would otherwise become a Gemm. TensorRT gets the biases back in their convolutions, because its documented
fusion of convolution, residual sum and activation begins with a convolution that has its bias.
"""

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from deploy.graph.constants import DEQUANTIZE, add_constant, constant, insert_behind
from deploy.graph.names import constant_name, operator_from_name, renamed_operator

LARGEST_INT32 = 2.0**31
BIAS = "Bias"  # the operator in the names of these Adds


def _scale(value: ir.Value | None) -> np.ndarray | None:
    """The constant scale of what a DequantizeLinear writes to `value`; None for any other value."""
    node = None if value is None else value.producer()
    return constant(node.inputs[1]) if node is not None and node.op_type == DEQUANTIZE else None


def _rounded(node: ir.Node, bias: np.ndarray) -> bool:
    """Whether ONNX Runtime's INT32 `bias` (N,) would not hold for `node`, whose first two inputs are factors."""
    scales = [_scale(value) for value in node.inputs[:2]]
    if scales[0] is None or scales[1] is None:
        return False
    if bias.dtype == np.float16:
        return True
    return bool((np.abs(bias) >= LARGEST_INT32 * np.float64(scales[0]) * scales[1]).any())


def _separate(graph: ir.Graph, conv: ir.Node, bias: np.ndarray) -> None:
    """Move the `bias` (N,) of `conv` to an Add behind it, named `<layer>/Bias`."""
    integers = constant(conv.inputs[1].producer().inputs[0])  # type: ignore[union-attr]
    assert integers is not None
    name = renamed_operator(conv.name or "", BIAS)
    conv.resize_inputs(2)
    value = add_constant(graph, constant_name(name, "bias"), bias.reshape(1, -1, *[1] * (integers.ndim - 2)))
    insert_behind(conv, "Add", name, value)


def _biases_behind(product: ir.Value) -> Iterator[tuple[ir.Node, int, np.ndarray]]:
    """(Add, input, bias) of every Add of a constant (N,) to `product`."""
    for user, index in product.uses():
        bias = constant(user.inputs[1 - index]) if user.op_type == "Add" else None
        if bias is not None and bias.ndim == 1:
            yield user, 1 - index, bias


def separate_biases(model: onnx.ModelProto) -> onnx.ModelProto:
    """A new model with the biases that ONNX Runtime would not round rightly in the forms that it leaves alone.

    In FP16 these are those of all products of a dequantized input and a dequantized weight.
    """
    result = ir.from_proto(model)
    graph = result.graph
    for node in list(graph):
        bias = constant(node.inputs[2]) if node.op_type == "Conv" and len(node.inputs) > 2 else None
        if bias is not None and _rounded(node, bias):
            _separate(graph, node, bias)
        elif node.op_type == "MatMul":
            for add, index, bias in list(_biases_behind(node.outputs[0])):
                if _rounded(node, bias):
                    name = constant_name(add.name or "", "bias")
                    add.replace_input_with(index, add_constant(graph, name, bias[None]))
    RemoveUnusedNodesPass()(result)
    return ir.to_proto(result)


def joined_biases(model: onnx.ModelProto) -> onnx.ModelProto:
    """A new model with the biases that `separate_biases` moved behind convolutions in these convolutions again."""
    result = ir.from_proto(model)
    graph = result.graph
    for add in [node for node in graph if operator_from_name(node.name or "") == BIAS]:
        product, value = add.inputs
        assert product is not None
        assert value is not None
        conv, bias = product.producer(), constant(value)
        assert conv is not None
        assert bias is not None
        conv.resize_inputs(3)
        conv.replace_input_with(2, add_constant(graph, f"{value.name}_of_conv", bias.reshape(-1)))
        written = add.outputs[0]
        if written.is_graph_output():
            product.name, written.name = written.name, add.name
        written.replace_all_uses_with(product, replace_graph_outputs=True)
        graph.remove(add, safe=True)
    RemoveUnusedNodesPass()(result)
    return ir.to_proto(result)
