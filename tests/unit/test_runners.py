"""ONNX Runtime computes INT8 exactly, whatever the processor."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks.peer_judge import _Network
from deploy.runners import OnnxRunner, integer_layers

INNER, OUTER = 64, 16


@pytest.fixture(scope="module")
def product(tmp_path_factory):
    """Q -> DQ -> MatMul with an INT8 weight, all of it the largest integer."""
    constants = {
        "one": np.float32(1), "zero": np.int8(0), "weight": np.full((INNER, OUTER), 127, np.int8),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["weight", "one", "zero"], ["w"]),
        helper.make_node("MatMul", ["xq", "w"], ["y"]),
    ]
    shapes = {"x": ["batch", INNER], "y": ["batch", OUTER]}
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name])] for name in shapes]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "product", *ends, initializers), opset_imports=[helper.make_opsetid("", 19)]
    )
    model.ir_version = 10
    path = tmp_path_factory.mktemp("product") / "product.onnx"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("runner", [OnnxRunner, _Network])
def test_the_largest_products_do_not_saturate(product, runner):
    x = np.full((3, INNER), 127, np.float32)
    assert integer_layers(product) == 1
    assert np.array_equal(runner(product)(x), np.full((3, OUTER), 127 * 127 * INNER))
