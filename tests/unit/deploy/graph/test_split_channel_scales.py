import re
import struct

import numpy as np
import onnx
import onnxruntime
import pytest

from deploy.engine.plan_text import kernels_from_rtx_plan
from deploy.graph.check import check_strongly_typed
from deploy.graph.split_channel_scales import split_channel_scales, tensor_and_channel_scales

WIDTH, HIDDEN, TOKENS = 64, 128, 16
TINY, HUGE = 2.0**-24, 65504.0  # the smallest and largest FP16 numbers


def model_from_text(dtype, inputs, output, body, tensors):
    """A model of ONNX text whose nodes are called after their outputs, as the exporter does."""
    text = f'<ir_version: 10, opset_import: ["" : 21]> g ({inputs}) => ({output}) {{ {body} }}'
    model = onnx.parser.parse_model(text.replace("FLOAT", "float16" if dtype is np.float16 else "float"))
    for name, tensor in tensors.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(tensor), name))
    for node in model.graph.node:
        node.name = node.output[0]
        node.ClearField("domain")  # the parser writes an empty one, which is not equal to none
    return model


def codes(rng, *shape):
    return rng.integers(-127, 128, shape, dtype=np.int8)


def weight_scales(rng, dtype, n):
    return (rng.uniform(0.5, 4.0, n) * 2e-3).astype(dtype)


def mlp(dtype):
    """The second half of a ViT block: LayerNormalization, fc1, Gelu, fc2, residual."""
    rng = np.random.default_rng(0)
    tensors = {
        "gamma": rng.uniform(0.5, 2, WIDTH).astype(dtype), "beta": rng.normal(0, 0.1, WIDTH).astype(dtype),
        "zero": np.int8(0), "s1": dtype(0.013), "s2": dtype(0.021),
        "w1": codes(rng, WIDTH, HIDDEN), "w1_scale": weight_scales(rng, dtype, HIDDEN),
        "w2": codes(rng, HIDDEN, WIDTH), "w2_scale": weight_scales(rng, dtype, WIDTH),
        "b1": rng.normal(0, 0.3, HIDDEN).astype(dtype), "b2": rng.normal(0, 0.3, WIDTH).astype(dtype),
    }  # fmt: skip
    body = """
        norm = LayerNormalization(input, gamma, beta)
        "fc1/Q" = QuantizeLinear(norm, s1, zero)  "fc1/DQ" = DequantizeLinear("fc1/Q", s1, zero)
        "fc1/W" = DequantizeLinear<axis = 1>(w1, w1_scale)
        "fc1/MatMul" = MatMul("fc1/DQ", "fc1/W")  "fc1/Add" = Add("fc1/MatMul", b1)  act = Gelu("fc1/Add")
        "fc2/Q" = QuantizeLinear(act, s2, zero)  "fc2/DQ" = DequantizeLinear("fc2/Q", s2, zero)
        "fc2/W" = DequantizeLinear<axis = -1>(w2, w2_scale)
        "fc2/MatMul" = MatMul("fc2/DQ", "fc2/W")  "fc2/Add" = Add("fc2/MatMul", b2)
        output = Add("fc2/Add", input)"""
    shape = f"[B,{TOKENS},{WIDTH}]"
    return model_from_text(dtype, f"FLOAT{shape} input", f"FLOAT{shape} output", body, tensors)


def run(model, x):
    """The output as the nodes say: ONNX Runtime's own graph changes would round differently."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def constants(model):
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def nodes(model):
    return {node.name: node for node in model.graph.node}


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(
    ("low", "high"),
    [(-10, -6), (-24, -20), (-24, -2), (-3, 3), (-24, 15)],
    ids=["usual", "subnormal", "uneven", "around 1", "all of FP16"],
)
def test_channel_times_tensor_scale_is_the_scale_in_every_bit(dtype, low, high):
    rng = np.random.default_rng(high - low)
    for _ in range(50):
        scales = np.clip(2.0 ** rng.uniform(low, high, rng.integers(1, 40)), TINY, HUGE).astype(dtype)
        t, c = tensor_and_channel_scales(scales)
        assert t.dtype == c.dtype == dtype
        assert t.shape == ()
        assert np.frexp(t)[0] == 0.5, "not a power of two"
        np.testing.assert_array_equal((c * t).view(f"u{scales.itemsize}"), scales.view(f"u{scales.itemsize}"))
        assert t == min(1, 2.0 ** np.ceil(np.log2(scales.max().astype(np.float64))))
        # normal wherever a factor of at most 1 can be
        normal = scales.astype(np.float64) >= 2.0**-14 * t.astype(np.float64)
        assert (c[normal] >= 2.0**-14).all()


@pytest.mark.parametrize(
    ("scales", "t", "c"),
    [
        ([0.25], 0.25, [1]),  # a power of two is its own bound
        ([0.26, 0.25], 0.5, [0.52, 0.5]),
        ([TINY], TINY, [1]),
        ([1.0, TINY], 1, [1, TINY]),  # c is subnormal here, and exact all the same
        ([HUGE, 3 * TINY], 1, [HUGE, 3 * TINY]),  # t = 65536 would not be an FP16 number
    ],
)
def test_tensor_scale_of_known_scales(scales, t, c):
    got_t, got_c = tensor_and_channel_scales(np.array(scales, np.float16))
    assert got_t == t
    np.testing.assert_array_equal(got_c, np.array(c, np.float16))


def test_graph_after_the_split():
    before, after = mlp(np.float16), split_channel_scales(mlp(np.float16))
    onnx.checker.check_model(after, full_check=True)
    assert check_strongly_typed(after) == ()
    assert set(nodes(after)) == {*nodes(before), "fc1/ChannelScale", "fc2/ChannelScale"}
    old, new, value = nodes(before), nodes(after), constants(after)
    for layer in ("fc1", "fc2"):
        weight, matmul, mul, add = (new[f"{layer}/{op}"] for op in ("W", "MatMul", "ChannelScale", "Add"))
        assert matmul == old[f"{layer}/MatMul"]
        assert mul.input[0] == matmul.output[0]
        assert add.input[0] == mul.output[0]
        assert not weight.attribute
        t, c = value[weight.input[1]], value[mul.input[1]]
        assert t.shape == ()
        np.testing.assert_array_equal(t * c, constants(before)[old[weight.name].input[1]])
    assert not {"w1_scale", "w2_scale"} & set(value)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_output_stays_and_so_does_the_given_model(dtype):
    model = mlp(dtype)
    before = model.SerializeToString(deterministic=True)
    after = split_channel_scales(model)
    assert model.SerializeToString(deterministic=True) == before
    x = np.random.default_rng(1).normal(size=(2, TOKENS, WIDTH)).astype(dtype)
    expected, got = run(model, x), run(after, x)
    assert np.abs(expected).max() > 1
    # A product rounds twice instead of once; where that tips an input of fc2, one step of it times a weight.
    rounding = 2 * np.finfo(dtype).eps * np.abs(expected).max()
    tip = 0.021 * 127 * 8e-3
    error = np.abs(got.astype(np.float64) - expected.astype(np.float64))
    print(f"{np.median(error)=:.2g} {error.max()=:.2g} {rounding=:.2g} {tip=:.2g}")
    assert np.median(error) <= rounding
    assert error.max() <= rounding + 2 * tip


def test_a_split_model_is_left_as_it_is():
    once = split_channel_scales(mlp(np.float16))
    assert split_channel_scales(once) == once


def dequantized_product(body, output="FLOAT[B,8] y", **tensors):
    rng = np.random.default_rng(0)
    tensors = {"w": codes(rng, 8, 8), "s": weight_scales(rng, np.float32, 8)} | tensors
    return model_from_text(np.float32, "FLOAT[B,8] x", output, body, tensors)


MAPS = {"w": np.ones((8, 8, 1, 1), np.int8), "to4": np.array([-1, 8, 1, 1]), "to2": np.array([-1, 8])}
UNTOUCHED = {
    "convolution with a bias": (
        "W = DequantizeLinear<axis = 0>(w, s)  i = Reshape(x, to4)  c = Conv(i, W, b)  y = Reshape(c, to2)",
        MAPS | {"b": np.ones(8, np.float32)},
    ),
    "convolution with scales per input channel": (
        "W = DequantizeLinear<axis = 1>(w, s)  i = Reshape(x, to4)  c = Conv(i, W)  y = Reshape(c, to2)", MAPS
    ),
    "weight of a convolution and of a product": (
        """W = DequantizeLinear<axis = 0>(w, s)  i = Reshape(x, to4)  c = Conv(i, W)  r = Reshape(c, to2)
        W2 = Reshape(W, to2)  y = MatMul(r, W2)""", MAPS
    ),
    "per-tensor scale": ("W = DequantizeLinear(w, s)  y = MatMul(x, W)", {"s": np.float32(0.01)}),
    "scales per input channel": ("W = DequantizeLinear<axis = 0>(w, s)  y = MatMul(x, W)", {}),
    "weight on the left": (
        "W = DequantizeLinear<axis = 1>(w, s)  t = Transpose(x)  m = MatMul(W, t)  y = Transpose(m)", {}
    ),
    "weight that an Add reads too": (
        "W = DequantizeLinear<axis = 1>(w, s)  m = MatMul(x, W)  W2 = Add(W, W)  y = MatMul(m, W2)", {}
    ),
    "weight of a Gemm": ("W = DequantizeLinear<axis = 1>(w, s)  y = Gemm(x, W)", {}),
    "weight that the graph returns": (
        "W = DequantizeLinear<axis = 1>(w, s)  y = MatMul(x, W)", {"output": "FLOAT[B,8] y, FLOAT[8,8] W"}
    ),
    "batch of weights, scales per input channel": (
        "W = DequantizeLinear<axis = 1>(w, s)  m = MatMul(x, W)  y = Squeeze(m)",
        {"w": np.ones((1, 8, 8), np.int8)},
    ),
    "uint8 weight": (
        "W = DequantizeLinear<axis = 1>(w, s)  y = MatMul(x, W)", {"w": np.ones((8, 8), np.uint8)}
    ),
}  # fmt: skip


@pytest.mark.parametrize(("body", "options"), UNTOUCHED.values(), ids=UNTOUCHED)
def test_untouched(body, options):
    model = dequantized_product(body, **options)
    after = split_channel_scales(model)
    assert list(after.graph.node) == list(model.graph.node)
    assert list(after.graph.initializer) == list(model.graph.initializer)


SPLIT = {
    "two weights share one scale": (
        """W1 = DequantizeLinear(w, s)  "a/MatMul" = MatMul(x, W1)
        W2 = DequantizeLinear<axis = 1>(w, s)  "b/MatMul" = MatMul("a/MatMul", W2)  y = Relu("b/MatMul")""", 2
    ),
    "two products share one weight": (
        """W = DequantizeLinear<axis = 1>(w, s)  "a/MatMul" = MatMul(x, W)
        "a/MatMul_1" = MatMul("a/MatMul", W)  y = Relu("a/MatMul_1")""", 2
    ),
    "two read the product": (
        """W = DequantizeLinear<axis = 1>(w, s)  "a/MatMul" = MatMul(x, W)
        n = Neg("a/MatMul")  y = Mul(n, "a/MatMul")""", 1
    ),
    "zero points of the weight": (
        'W = DequantizeLinear<axis = 1>(w, s, z)  "a/MatMul" = MatMul(x, W)  y = Relu("a/MatMul")', 1
    ),
    "scales in a Constant node": (
        """k = Constant<value = float[8] {1, 2, 3, 4, 5, 6, 7, 8}>()  W = DequantizeLinear<axis = 1>(w, k)
        "a/MatMul" = MatMul(x, W)  y = Relu("a/MatMul")""", 1
    ),
}  # fmt: skip


@pytest.mark.parametrize(("body", "count"), SPLIT.values(), ids=SPLIT)
def test_split_where_constants_and_values_are_shared(body, count):
    model = dequantized_product(body, z=np.zeros(8, np.int8))
    after = split_channel_scales(model)
    onnx.checker.check_model(after, full_check=True)
    assert sum(name.split("/")[-1].startswith("ChannelScale") for name in nodes(after)) == count
    assert all(constants(after)[n.input[1]].shape == () for n in after.graph.node if n.op_type == "DequantizeLinear")
    x = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)
    np.testing.assert_allclose(run(after, x), run(model, x), rtol=1e-5, atol=1e-5)


def test_output_of_the_graph_keeps_its_name():
    model = dequantized_product("W = DequantizeLinear<axis = 1>(w, s)  y = MatMul(x, W)")
    model.graph.node[1].name = "head/MatMul"
    after = split_channel_scales(model)
    onnx.checker.check_model(after, full_check=True)
    assert [value.name for value in after.graph.output] == ["y"]
    assert nodes(after)["head/ChannelScale"].output == ["y"]
    x = np.eye(8, dtype=np.float32)
    np.testing.assert_array_equal(run(after, x), run(model, x))  # one product each: nothing rounds


def rtx_plan(model, size=(TOKENS, WIDTH)):
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    assert trt.OnnxParser(network, logger).parse(model.SerializeToString())
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    profile.set_shape("input", *((batch, *size) for batch in (1, 8, 32)))
    config.add_optimization_profile(profile)
    return bytes(builder.build_serialized_network(network, config))


def alphas(plan):
    """What `plan` multiplies the integer sums of its products by, in float."""
    found = re.findall(rb"fully_connected=\{[^\n]* alpha=([0-9A-F]{8})", plan)
    return [struct.unpack(">f", bytes.fromhex(text.decode()))[0] for text in found]


def test_tensorrt_rtx_scales_the_integer_sum_before_it_writes_fp16():
    model = mlp(np.float16)
    split = split_channel_scales(model)
    before, after = rtx_plan(model), rtx_plan(split)
    assert alphas(before) == [1, 1]
    value = constants(split)
    expected = [np.float32(value[f"s{i}"]) * np.float32(value[f"fc{i}/W/scale"]) for i in (1, 2)]
    assert alphas(after) == expected
    assert len(kernels_from_rtx_plan(after)) <= len(kernels_from_rtx_plan(before))
    assert [k.precision for k in kernels_from_rtx_plan(after) if k.kind == "gemm"] == ["int8", "int8"]


def convolution(scales):
    """A quantized 3 x 3 convolution of maps with an Add, a ReLU and the next quantizer behind it."""
    rng = np.random.default_rng(0)
    tensors = {
        "zero": np.int8(0), "s1": np.float16(0.013), "s2": np.float16(0.02), "w": codes(rng, 32, 16, 3, 3),
        "w_scale": scales, "b": rng.normal(0, 0.3, (1, 32, 1, 1)).astype(np.float16),
    }  # fmt: skip
    body = """
        "c/Q" = QuantizeLinear(input, s1, zero)  "c/DQ" = DequantizeLinear("c/Q", s1, zero)
        "c/W" = DequantizeLinear<axis = 0>(w, w_scale)  "c/Conv" = Conv<pads = [1, 1, 1, 1]>("c/DQ", "c/W")
        "c/Bias" = Add("c/Conv", b)  relu = Relu("c/Bias")
        q = QuantizeLinear(relu, s2, zero)  output = DequantizeLinear(q, s2, zero)"""
    return model_from_text(np.float16, "FLOAT[B,16,8,8] input", "FLOAT[B,32,8,8] output", body, tensors)


def test_a_convolution_is_split_before_its_bias():
    model = convolution(weight_scales(np.random.default_rng(1), np.float16, 32))
    split = split_channel_scales(model)
    onnx.checker.check_model(split, full_check=True)
    assert check_strongly_typed(split) == ()
    assert nodes(split)["c/Bias"].input[0] == "c/ChannelScale"
    assert constants(split)["c/W/channel_scale"].shape == (1, 32, 1, 1)
    x = np.random.default_rng(2).normal(size=(2, 16, 8, 8)).astype(np.float16)
    one, other = (run(each, x).astype(np.float64) for each in (model, split))
    assert float(np.abs(one - other).max()) <= 0.021, "one step at most: FP16 rounds at another place"
    assert float((one != other).mean()) < 0.01


def test_tensorrt_rtx_writes_a_split_convolution_in_fp16_and_launches_no_more_kernels():
    model = convolution(weight_scales(np.random.default_rng(1), np.float16, 32))
    before, after = (kernels_from_rtx_plan(rtx_plan(each, (16, 8, 8))) for each in (model, split_channel_scales(model)))
    assert [k.outputs for k in before if k.kind == "conv"] == [("fp32",)]
    assert [(k.outputs, k.precision) for k in after if k.kind == "conv"] == [(("fp16",), "int8")]
    assert len(after) <= len(before)


def side_by_side():
    """Two products of one quantized tensor, the second with weights a hundred times smaller."""
    rng = np.random.default_rng(0)
    tensors = {
        "zero": np.int8(0), "s": np.float16(0.013),
        "wa": codes(rng, WIDTH, HIDDEN), "a_scale": weight_scales(rng, np.float16, HIDDEN),
        "wb": codes(rng, WIDTH, WIDTH), "b_scale": weight_scales(rng, np.float16, WIDTH) / np.float16(100),
        "gamma": np.ones(WIDTH, np.float16), "beta": np.zeros(WIDTH, np.float16),
    }  # fmt: skip
    body = """
        norm = LayerNormalization(input, gamma, beta)
        Q = QuantizeLinear(norm, s, zero)  DQ = DequantizeLinear(Q, s, zero)
        "a/W" = DequantizeLinear<axis = 1>(wa, a_scale)  "a/MatMul" = MatMul(DQ, "a/W")
        "b/W" = DequantizeLinear<axis = 1>(wb, b_scale)  "b/MatMul" = MatMul(DQ, "b/W")
        a = Relu("a/MatMul")  b = Relu("b/MatMul")  output = Concat<axis = 2>(a, b)"""
    shape, wide = f"[B,{TOKENS},{WIDTH}]", f"[B,{TOKENS},{WIDTH + HIDDEN}]"
    return model_from_text(np.float16, f"FLOAT{shape} input", f"FLOAT{wide} output", body, tensors)


def test_products_of_one_tensor_share_the_tensor_scale_and_no_bit_is_lost():
    model = side_by_side()
    after = split_channel_scales(model)
    value, new = constants(after), nodes(after)
    scales = {
        layer: (value[new[f"{layer}/W"].input[1]], value[new[f"{layer}/ChannelScale"].input[1]]) for layer in "ab"
    }
    assert scales["a"][0] == scales["b"][0] == tensor_and_channel_scales(constants(model)["a_scale"])[0]
    for layer, (t, c) in scales.items():
        np.testing.assert_array_equal(t * c, constants(model)[f"{layer}_scale"])


def test_tensorrt_rtx_computes_products_of_one_tensor_in_one_kernel():
    kernels = kernels_from_rtx_plan(rtx_plan(split_channel_scales(side_by_side())))
    products = [kernel for kernel in kernels if kernel.kind == "gemm"]
    assert [kernel.precision for kernel in products] == ["int8"]
    assert {"a/MatMul", "b/MatMul"} <= set(products[0].layers)
