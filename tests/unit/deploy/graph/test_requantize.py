"""A second quantization to the same integers goes; any other stays."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploy.graph.requantize import read_the_same_integers
from deploy.measure.onnx_runner import OnnxRunner


def graph(first: float, second: float, zero_point: int = 0):
    scales = [numpy_helper.from_array(np.float32(value), name) for name, value in (("s1", first), ("s2", second))]
    zeros = [numpy_helper.from_array(np.int8(value), name) for name, value in (("z1", 0), ("z2", zero_point))]
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "s1", "z1"], ["q1"], "q1"),
        helper.make_node("DequantizeLinear", ["q1", "s1", "z1"], ["d1"], "d1"),
        helper.make_node("QuantizeLinear", ["d1", "s2", "z2"], ["q2"], "q2"),
        helper.make_node("DequantizeLinear", ["q2", "s2", "z2"], ["d2"], "d2"),
        helper.make_node("Add", ["d1", "d2"], ["output"], "add"),
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 8]) for name in ("input", "output")]
    made = helper.make_graph(nodes, "g", value[:1], value[1:], [*scales, *zeros])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def rewritten(model: onnx.ModelProto) -> onnx.ModelProto:
    edited = ir.from_proto(model)
    read_the_same_integers(edited)
    return ir.to_proto(edited)


@pytest.mark.parametrize(("second", "zero_point", "left"), [(0.1, 0, 1), (0.2, 0, 2), (0.1, 3, 2)])
def test_only_the_same_numbers_are_read_again(second, zero_point, left):
    model = graph(0.1, second, zero_point)
    found = rewritten(model)
    assert [node.op_type for node in found.graph.node].count("QuantizeLinear") == left
    x = np.random.default_rng(0).normal(0, 5, (16, 8)).astype(np.float32)
    one, other = (OnnxRunner(each.SerializeToString(), fused=False)(x) for each in (model, found))
    assert np.array_equal(one, other)
