"""Graphs with integer kernels against the same graphs as they are written, run node by node."""

import numpy as np
import onnx
import onnxruntime
import pytest

from deploy.graph.integer_kernels import integer_kernels, integer_steps
from deploy.measure.accuracy import sqnr_db
from deploy.measure.ort_options import saturates
from tests.unit.deploy.graph.test_split_channel_scales import codes, model_from_text, run

pytestmark = pytest.mark.skipif(saturates(), reason="the unsigned kernels of ONNX Runtime saturate on this processor")

CHANNELS, SIZE = 16, 9
EXACT_DB = 100  # the order of FP32 sums
MAX_TIPPED = 2e-3  # share of integers that a bias moved by half a step, or a tie, may tip by one
SHAPE = f"FLOAT[B,{CHANNELS},{SIZE},{SIZE}]"
DEQUANTIZED = "q = QuantizeLinear(x, s, zero)  dq = DequantizeLinear(q, s, zero)  W = DequantizeLinear<axis = 0>(w, ws)"
QUANTIZED = "q2 = QuantizeLinear(z, s2, zero)  y = DequantizeLinear(q2, s2, zero)"


def tensors(weight):
    rng = np.random.default_rng(0)
    size = np.sqrt(np.prod(weight.shape[1:]))
    per_channel = rng.uniform(-1.5, 0, (1, CHANNELS, 1, 1)).astype(np.float32)
    return {
        "zero": np.int8(0), "s": np.float32(0.02), "s2": np.float32(0.03), "w": weight,
        "b": rng.normal(0, 0.5, CHANNELS).astype(np.float32), "low": np.float32(0), "high": np.float32(2.5),
        "ws": (rng.uniform(1, 3, CHANNELS) * 0.01 / size).astype(np.float32),
        "lows": per_channel, "highs": per_channel + 3, "pads": np.array([0, 0, 1, 0, 0, 0, 2, 1]), "none": np.float32(0),
        "apart": rng.normal(0, 0.5, (1, CHANNELS, 1, 1)).astype(np.float32),
    }  # fmt: skip


def convolution(body, kernel=3, groups=1, output=SHAPE):
    weight = codes(np.random.default_rng(1), CHANNELS, CHANNELS // groups, kernel, kernel)
    return model_from_text(np.float32, f"{SHAPE} x", f"{output} y", f"{DEQUANTIZED} {body}", tensors(weight))


def images():
    return np.random.default_rng(2).normal(size=(3, CHANNELS, SIZE, SIZE)).astype(np.float32)


def run_whole(model, x):
    """The output with all optimizations of ONNX Runtime."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def operators(model):
    return [node.op_type for node in model.graph.node]


SAME = "<pads = [1, 1, 1, 1]>"
INTEGER = {
    "nothing between": (f"z = Conv{SAME}(dq, W, b)", {}),
    "no bias": (f"z = Conv{SAME}(dq, W)", {}),
    "Relu": (f"c = Conv{SAME}(dq, W, b)  z = Relu(c)", {}),
    "Clip": (f"c = Conv{SAME}(dq, W, b)  z = Clip(c, low, high)", {}),
    "bounds per channel": (f"c = Conv{SAME}(dq, W, b)  d = Max(c, lows)  z = Min(highs, d)", {}),
    "Min first": (f"c = Conv{SAME}(dq, W, b)  d = Min(c, highs)  z = Relu(d)", {}),
    "bias in an Add": (f"a = Conv{SAME}(dq, W)  c = Add(a, apart)  z = Relu(c)", {}),
    "zero padding": ("c = Conv(dq, W, b)  d = Relu(c)  z = Pad(d, pads, none)", {"output": "FLOAT[B,16,10,8]"}),
    "depthwise": (f"c = Conv<pads = [1, 1, 1, 1], group = {CHANNELS}>(dq, W, b)  z = Relu(c)", {"groups": CHANNELS}),
    "groups": ("z = Conv<pads = [1, 1, 1, 1], group = 4>(dq, W, b)", {"groups": 4}),
    "strides": ("z = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(dq, W, b)", {"output": "FLOAT[B,16,5,5]"}),
    "1 x 1": ("c = Conv(dq, W, b)  z = Relu(c)", {"kernel": 1}),
}  # fmt: skip


@pytest.mark.parametrize(("body", "options"), INTEGER.values(), ids=INTEGER)
def test_a_convolution_up_to_the_next_quantizer_is_one_of_integers(body, options):
    model = convolution(f"{body} {QUANTIZED}", **options)
    rewritten, written = integer_kernels(model)
    onnx.checker.check_model(rewritten)
    assert written == {"QLinearConv": 1}
    assert "Conv" not in operators(rewritten)
    assert operators(rewritten).count("QuantizeLinear") == 1
    exact = run(model, images())
    assert np.unique(exact).size > 20
    for found in (run(rewritten, images()), run_whole(rewritten, images())):
        steps = np.abs(np.rint((found - exact) / 0.03))
        print(f"{(steps > 0).mean()=:.1e}")
        assert steps.max() <= 1
        assert (steps > 0).mean() <= MAX_TIPPED


PRODUCTS = {
    "1 x 1 convolution": ("c = Conv(dq, W, b)  y = Add(c, x)", {"kernel": 1}),
    "without bias": ("c = Conv(dq, W)  y = Add(c, x)", {"kernel": 1}),
    "bias in an Add": ("c = Conv(dq, W)  y = Add(apart, c)", {"kernel": 1}),
    "its output": ("y = Conv(dq, W, b)", {"kernel": 1}),
    "strides": ("y = Conv<strides = [2, 3]>(dq, W, b)", {"kernel": 1, "output": "FLOAT[B,16,5,3]"}),
}


@pytest.mark.parametrize(("body", "options"), PRODUCTS.values(), ids=PRODUCTS)
def test_a_1x1_convolution_whose_output_stays_float_is_a_product(body, options):
    model = convolution(body, **options)
    rewritten, written = integer_kernels(model)
    onnx.checker.check_model(rewritten)
    assert written == {"MatMulIntegerToFloat": 1}
    assert [value.name for value in rewritten.graph.output] == ["y"]
    for whole in (run, run_whole):
        assert sqnr_db(run(model, images()), whole(rewritten, images())) > EXACT_DB


def linear(bias, body="y = Relu(c)", width=CHANNELS):
    weight = np.ascontiguousarray(codes(np.random.default_rng(1), CHANNELS, CHANNELS))
    text = DEQUANTIZED.replace("axis = 0", "axis = 1") + f"m = MatMul(dq, W)  c = Add({bias})  {body}"
    given = tensors(weight) | {"row": tensors(weight)["b"][None], "image": np.ones((SIZE, width), np.float32)}
    return model_from_text(np.float32, f"FLOAT[B,{SIZE},{CHANNELS}] x", f"FLOAT[B,{SIZE},{CHANNELS}] y", text, given)


@pytest.mark.parametrize(("bias", "adds"), [("m, b", 0), ("b, m", 0), ("m, row", 0), ("m, image", 1), ("m, x", 1)])
def test_a_product_takes_its_bias_inside_and_nothing_else(bias, adds):
    model = linear(bias)
    rewritten, written = integer_kernels(model)
    assert written == {"MatMulIntegerToFloat": 1}
    assert operators(rewritten).count("Add") == adds
    x = np.random.default_rng(2).normal(size=(3, SIZE, CHANNELS)).astype(np.float32)
    for whole in (run, run_whole):
        assert sqnr_db(run(model, x), whole(rewritten, x)) > EXACT_DB


def test_two_layers_in_a_row_and_two_readers_of_one_tensor():
    body = f"""c = Conv{SAME}(dq, W, b)  z = Relu(c)  q2 = QuantizeLinear(z, s2, zero)  d2 = DequantizeLinear(q2, s2, zero)
        e = Conv{SAME}(d2, W, b)  d3 = DequantizeLinear(q2, s2, zero)  y = Add(e, d3)"""
    model = convolution(body)
    rewritten, written = integer_kernels(model)
    assert written == {"QLinearConv": 1}  # the second has a float output and is not 1 x 1
    assert sqnr_db(run(model, images()), run(rewritten, images())) > 50


UNTOUCHED = {
    "bias beyond INT32": (f"c = Conv{SAME}(dq, W, huge)  z = Relu(c)  {QUANTIZED}", {}),
    "another reader": (f"z = Conv{SAME}(dq, W, b)  q2 = QuantizeLinear(z, s2, zero)  d = DequantizeLinear(q2, s2, zero)"
                       "y = Add(d, z)", {}),
    "an operator between": (f"c = Conv{SAME}(dq, W, b)  z = Sigmoid(c)  {QUANTIZED}", {}),
    "float input": (f"z = Conv{SAME}(x, W, b)  {QUANTIZED}", {}),
    "padding with ones": (f"c = Conv(dq, W, b)  z = Pad(c, pads, high)  {QUANTIZED}", {"output": "FLOAT[B,16,10,8]"}),
}  # fmt: skip


@pytest.mark.parametrize(("body", "options"), UNTOUCHED.values(), ids=UNTOUCHED)
def test_what_is_left_alone(body, options):
    model = convolution(body, **options)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.full(CHANNELS, 1e9, np.float32), "huge"))
    rewritten, written = integer_kernels(model)
    assert written == {}
    assert sqnr_db(run(model, images()), run(rewritten, images())) == 200


def test_the_given_model_stays():
    model = convolution(f"c = Conv{SAME}(dq, W, b)  z = Relu(c)  {QUANTIZED}")
    before = model.SerializeToString(deterministic=True)
    integer_kernels(model)
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("seed", range(5))
def test_steps_on_integers_are_those_on_numbers(seed):
    rng = np.random.default_rng(seed)
    scale = np.float32(rng.uniform(0.01, 0.1))
    y = rng.normal(0, 4, 10_000).astype(np.float32)
    bounds = [(op, np.float32(bound)) for op in ("Max", "Min", "Max", "Min") for bound in rng.normal(0, 2, 2)]

    def quantized(numbers):
        return np.clip(np.rint(numbers / scale), -128, 127) + 128

    limit = {"Max": np.maximum, "Min": np.minimum}
    expected, found = y, quantized(y)
    for op, bound in bounds:
        expected = limit[op](expected, bound)
    for op, bound in integer_steps(bounds, scale):
        assert bound.dtype == np.uint8
        found = limit[op](found, bound)
    np.testing.assert_array_equal(found, quantized(expected))


def test_steps_that_change_no_integer_are_left_out():
    scale = np.float32(0.01)
    assert list(integer_steps([("Max", np.float32(-1.28)), ("Min", np.float32(1.27))], scale)) == []
    assert [op for op, _ in integer_steps([("Max", np.float32(-1.2)), ("Min", np.float32(1.2))], scale)] == [
        "Max",
        "Min",
    ]


@pytest.mark.parametrize("which", ["zero", "weight_zero"])
def test_other_zero_points_are_left_alone(which):
    weight = np.ascontiguousarray(codes(np.random.default_rng(1), CHANNELS, CHANNELS))
    text = """q = QuantizeLinear(x, s, zero)  dq = DequantizeLinear(q, s, zero)
        W = DequantizeLinear<axis = 1>(w, ws, weight_zero)  y = MatMul(dq, W)"""
    given = tensors(weight) | {"weight_zero": np.zeros(CHANNELS, np.int8)}
    given[which] = given[which] + np.int8(3)
    shape = f"FLOAT[B,{SIZE},{CHANNELS}]"
    rewritten, written = integer_kernels(model_from_text(np.float32, f"{shape} x", f"{shape} y", text, given))
    assert written == {}
    assert "MatMul" in operators(rewritten)
