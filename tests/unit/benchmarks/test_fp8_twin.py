"""The FP8 twin of a graph rounds at the same places to the same largest values. Oracle: the numbers of E4M3, listed."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks.fp8_twin import fp8_twin

# every non-negative number of E4M3: 8 subnormal ones, then 8 per power of two, the last of which would be NaN
E4M3 = np.array(
    [m * 2.0**-9 for m in range(8)] + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)][:-1]
)
SCALE, WEIGHT_SCALE = np.float32(0.02), np.array([0.01, 0.03], np.float32)
WEIGHT = np.array([[127, -64], [3, 100], [-1, 0]], np.int8)


def graph(kind=np.int8, shared=False, zeros=True):
    """x -> Q -> DQ -> MatMul(DQ(W)), and where `shared` the scale of Q is added to the output."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["rounded"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", *(["zeros"] if zeros else [])], ["weight"], axis=1),
        helper.make_node("MatMul", ["rounded", "weight"], ["product"]),
        helper.make_node("Add", ["product", "scale" if shared else "nothing"], ["y"]),
    ]
    constants = {
        "scale": SCALE, "zero": kind(0), "w": WEIGHT, "w_scale": WEIGHT_SCALE, "zeros": np.zeros(2, np.int8),
        "nothing": np.float32(0),
    }  # fmt: skip
    made = helper.make_graph(
        nodes, "one", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def nearest(x):
    """E4M3 nearest to x, saturated, ties to even as its index says."""
    at = np.abs(np.abs(x)[..., None] - E4M3)
    least = at.min(-1, keepdims=True)
    tied = np.where(at == least, np.arange(len(E4M3)), -1)
    index = np.where((tied >= 0).sum(-1) > 1, tied.max(-1) - tied.max(-1) % 2, tied.max(-1))
    return np.sign(x) * E4M3[index]


def run(model, x):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})[0]


@pytest.mark.parametrize(("shared", "zeros"), [(False, True), (True, True), (False, False)])
def test_inputs_and_weights_are_rounded_to_e4m3(shared, zeros):
    assert E4M3.max() == 448
    x = np.random.default_rng(0).normal(0, 1, (50, 3)).astype(np.float32)
    twin = fp8_twin(onnx.shape_inference.infer_shapes(graph(shared=shared, zeros=zeros)))
    onnx.checker.check_model(twin, full_check=True)
    step = SCALE * 127 / 448
    weight = nearest(WEIGHT.astype(np.float32) * (448 / 127)) * (WEIGHT_SCALE * 127 / 448)
    expected = nearest(x / np.float32(step)) * step @ weight + (SCALE if shared else 0)
    np.testing.assert_allclose(run(twin, x), expected, rtol=1e-5, atol=1e-5)
    assert not any(tensor.data_type == TensorProto.INT8 for tensor in twin.graph.initializer)


def test_the_graph_itself_stays_as_it_is():
    model = graph()
    before = model.SerializeToString()
    fp8_twin(model)
    assert model.SerializeToString() == before


def test_another_type_is_refused():
    with pytest.raises(ValueError, match="does not round to INT8"):
        fp8_twin(graph(kind=np.uint8))
