"""ONNX Runtime computes INT8 exactly, whatever the processor."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks.peers.judge import Network
from deploy.graph.zero_points import with_zero_points
from deploy.host import int8_instructions
from deploy.measure import integer_graph as graphs
from deploy.measure import ort_options
from deploy.measure.integer_graph import integer_graph, integer_layers
from deploy.measure.onnx_runner import OnnxRunner

INNER, OUTER, SIDE = 64, 16, 5


@pytest.fixture(scope="module", params=["MatMul", "Conv"])
def product(request, tmp_path_factory):
    """Q -> DQ -> MatMul or Conv with an INT8 weight, all of it the largest integer, one scale per output channel."""
    convolution = request.param == "Conv"
    shape = (OUTER, INNER, 1, 1) if convolution else (INNER, OUTER)
    constants = {
        "one": np.float32(1), "zero": np.int8(0), "weight": np.full(shape, 127, np.int8), "ones": np.ones(OUTER, np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["weight", "ones"], ["w"], axis=0 if convolution else 1),
        helper.make_node(request.param, ["xq", "w"], ["y"]),
    ]
    pixels = [SIDE, SIDE] if convolution else []
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", channels, *pixels])]
        for name, channels in (("x", INNER), ("y", OUTER))
    ]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "product", *ends, initializers), opset_imports=[helper.make_opsetid("", 19)]
    )
    model.ir_version = 10
    with_zero_points(model)
    path = tmp_path_factory.mktemp("product") / "product.onnx"
    onnx.save(model, path)
    return path, (3, INNER, *pixels), (3, OUTER, *pixels)


@pytest.mark.parametrize("runner", [OnnxRunner, Network])
def test_the_largest_products_do_not_saturate(product, runner):
    path, reads, returns = product
    found = runner(path)(np.full(reads, 127, np.float32))
    assert np.array_equal(found, np.full(returns, 127 * 127 * INNER))


def test_matrix_products_run_in_integers(product):
    if onnx.load(product[0]).graph.node[-1].op_type == "MatMul":
        assert integer_layers(product[0]) == 1


def test_only_weights_get_zero_points(product):
    *_, activation, weight, _ = onnx.load(product[0]).graph.node
    assert activation.input[2] == "zero"
    assert weight.input[2] == "w/zero_points"


def test_the_graph_that_tells_is_a_product_of_the_largest_integers():
    integers = {
        "one": np.float32(1),
        "zero": np.int8(0),
        "weight": np.full((ort_options.DEPTH, ort_options.WIDTH), ort_options.LARGEST, np.int8),
        "ones": np.ones(ort_options.WIDTH, np.float32),
        "zeros": np.zeros(ort_options.WIDTH, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["weight", "ones", "zeros"], ["w"], axis=1),
        helper.make_node("MatMul", ["xq", "w"], ["y"]),
    ]
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size])
        for name, size in (("x", ort_options.DEPTH), ("y", ort_options.WIDTH))
    )
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in integers.items()]
    graph = helper.make_graph(nodes, "product", [x], [y], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    assert onnx.load_model_from_string(ort_options.product_graph()) == model


@pytest.mark.parametrize("saturating", [True, False])
def test_exact_kernels_are_asked_for_where_the_default_ones_saturate(monkeypatch, saturating):
    monkeypatch.setattr(ort_options, "saturates", lambda: saturating)
    options = ort_options.ort_options(1)
    if saturating:
        assert options.get_session_config_entry(ort_options.EXACT_SUMS) == "1"
    else:
        with pytest.raises(RuntimeError):
            options.get_session_config_entry(ort_options.EXACT_SUMS)


def test_the_default_kernels_are_exact_on_a_processor_with_vnni():
    if not {"avx512_vnni", "avx_vnni"} & {*int8_instructions()}:
        pytest.skip("a processor without VNNI")
    assert not ort_options.saturates()


@pytest.mark.parametrize("name", ["o\udcc3\udcbc.onnx", "lat\udce9.onnx"], ids=["UTF-8 in an ASCII locale", "Latin-1"])
def test_a_path_that_python_cannot_encode_is_read(tmp_path, product, name):
    (tmp_path / name).write_bytes(product[0].read_bytes())
    assert OnnxRunner(tmp_path / name).inputs[0].name
    assert integer_layers(tmp_path / name) >= 0


@pytest.mark.parametrize("saturating", [True, False])
def test_integer_kernels_are_written_where_they_are_exact(monkeypatch, product, saturating):
    monkeypatch.setattr(graphs, "saturates", lambda: saturating)
    graph, written = integer_graph(product[0])
    assert written == ({} if saturating else {"MatMulIntegerToFloat": 1})
    assert (graph == product[0]) is saturating


def test_the_largest_products_of_integer_kernels_do_not_saturate(product):
    path, reads, returns = product
    found = OnnxRunner(integer_graph(path)[0])(np.full(reads, 127, np.float32))
    assert np.array_equal(found, np.full(returns, 127 * 127 * INNER))
