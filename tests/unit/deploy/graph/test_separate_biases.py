"""What a session with default options makes of graphs whose scales multiply to something that FP16 cannot hold."""

import numpy as np
import onnx
import onnxruntime
import pytest

from deploy.engine.backends import tensorrt_rtx
from deploy.engine.build import Profile
from deploy.graph.check import check_strongly_typed
from deploy.graph.separate_biases import joined_biases, separate_biases
from deploy.measure.accuracy import sqnr_db
from tests.unit.deploy.graph.test_split_channel_scales import codes, constants, model_from_text, nodes

CHANNELS, SIZE = 8, 6
WRONG_DB, RIGHT_DB = 30, 60  # FP16 noise alone leaves more than 60 dB of one layer
WEIGHT_SCALE = 1e-4  # a bias of 0.5 divided by 0.02 of these exceeds FP16
ALL, NONE = (
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
)


def tensors(dtype, weight, scale=WEIGHT_SCALE):
    rng = np.random.default_rng(0)
    return {
        "zero": np.int8(0), "s": dtype(0.02), "s2": dtype(0.01), "w": weight, "b": np.full(CHANNELS, 0.5, dtype),
        "ws": (rng.uniform(1, 2, CHANNELS) * scale).astype(dtype), "low": dtype(0), "high": dtype(6),
    }  # fmt: skip


DEQUANTIZED = "q = QuantizeLinear(x, s, zero)  dq = DequantizeLinear(q, s, zero)"
QUANTIZED = "q2 = QuantizeLinear(z, s2, zero)  y = DequantizeLinear(q2, s2, zero)"
ACTIVATIONS = {"none": "z = Identity(c)", "relu": "z = Relu(c)", "clip": "z = Clip(c, low, high)"}


def convolution(dtype=np.float16, activation="z = Relu(c)", **options):
    body = f"""{DEQUANTIZED}  W = DequantizeLinear<axis = 0>(w, ws)
        c = Conv<pads = [1, 1, 1, 1]>(dq, W, b)  {activation}  {QUANTIZED}"""
    body = body.replace("z = Identity(c)", "").replace("(z,", "(c," if "Identity" in activation else "(z,")
    shape = f"FLOAT[B,{CHANNELS},{SIZE},{SIZE}]"
    weight = codes(np.random.default_rng(1), CHANNELS, CHANNELS, 3, 3)
    return model_from_text(dtype, f"{shape} x", f"{shape} y", body, tensors(dtype, weight, **options))


def linear(dtype=np.float16):
    body = f"""{DEQUANTIZED}  W = DequantizeLinear<axis = 1>(w, ws)
        m = MatMul(dq, W)  c = Add(m, b)  z = Relu(c)  {QUANTIZED}"""
    shape = f"FLOAT[B,{CHANNELS}]"
    weight = codes(np.random.default_rng(1), CHANNELS, CHANNELS)
    return model_from_text(dtype, f"{shape} x", f"{shape} y", body, tensors(dtype, weight))


def run(model, level):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    given = session.get_inputs()[0]
    dtype = np.float16 if "float16" in given.type else np.float32
    x = np.random.default_rng(2).normal(size=(2, *given.shape[1:])).astype(dtype)
    return session.run(None, {given.name: x})[0].astype(np.float64)


def default_db(model):
    """How near a session with default options comes to the nodes as they are written (dB)."""
    return sqnr_db(run(model, NONE), run(model, ALL))


GRAPHS = {f"convolution, {name}": convolution(activation=text) for name, text in ACTIVATIONS.items()} | {
    "linear": linear()
}


@pytest.mark.parametrize("model", GRAPHS.values(), ids=GRAPHS)
def test_a_default_session_reads_the_separate_form_rightly_and_no_other(model):
    assert default_db(model) < WRONG_DB, "ONNX Runtime no longer rounds biases: is the rewrite still needed?"
    separate = separate_biases(model)
    onnx.checker.check_model(separate, full_check=True)
    assert check_strongly_typed(separate) == ()
    assert default_db(separate) > RIGHT_DB
    np.testing.assert_array_equal(run(separate, NONE), run(model, NONE))


@pytest.mark.parametrize("model", GRAPHS.values(), ids=GRAPHS)
def test_tensorrt_rtx_builds_both_forms_to_as_many_kernels_of_the_same_kinds(model):
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for node in model.graph.node:
        node.name = f"{node.output[0]}/{node.op_type}"
        model.graph.input[0].name = "input"
        node.input[:] = ["input" if name == "x" else name for name in node.input]
    kinds = [
        [(kernel.kind, kernel.precision) for kernel in tensorrt_rtx.build(each, Profile(), (89,)).kernels]
        for each in (model, separate_biases(model))
    ]
    assert kinds[0]
    assert kinds[0] == kinds[1]


def test_a_bias_that_int32_holds_stays_in_a_graph_of_fp32():
    model = convolution(np.float32)
    assert default_db(model) > RIGHT_DB
    assert list(separate_biases(model).graph.node) == list(model.graph.node)


def test_a_bias_beyond_int32_leaves_a_convolution_of_fp32():
    model = convolution(np.float32, scale=1e-12)
    assert default_db(model) < WRONG_DB
    separate = separate_biases(model)
    assert default_db(separate) > RIGHT_DB
    assert [node.op_type for node in separate.graph.node].count("Add") == 1


def test_the_given_model_stays_and_outputs_keep_their_names():
    model = convolution(activation="z = Identity(c)")
    del model.graph.node[-2:]
    model.graph.node[-1].name, model.graph.output[0].name = "stem/Conv", "c"
    before = model.SerializeToString(deterministic=True)
    separate = separate_biases(model)
    assert model.SerializeToString(deterministic=True) == before
    assert nodes(separate)["stem/Bias"].output == ["c"]
    assert constants(separate)["stem/Bias/bias"].shape == (1, CHANNELS, 1, 1)
    assert "b" not in constants(separate)
    assert separate_biases(separate) == separate


def test_a_convolution_that_nothing_dequantizes_keeps_its_bias():
    model = convolution()
    nodes(model)["c"].input[0] = "x"
    assert nodes(separate_biases(model))["c"] == nodes(model)["c"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_joined_again_the_bias_is_in_its_convolution(activation):
    model = convolution(activation=ACTIVATIONS[activation])
    nodes(model)["c"].name = "stem/Conv"
    joined = joined_biases(separate_biases(model))
    onnx.checker.check_model(joined, full_check=True)
    assert [node.op_type for node in joined.graph.node] == [node.op_type for node in model.graph.node]
    np.testing.assert_array_equal(
        constants(joined)[next(n for n in joined.graph.node if n.op_type == "Conv").input[2]], 0.5
    )
    np.testing.assert_array_equal(run(joined, NONE), run(model, NONE))


def test_joined_again_an_output_keeps_its_name():
    model = convolution(activation="z = Identity(c)")
    del model.graph.node[-2:]
    model.graph.node[-1].name, model.graph.output[0].name = "stem/Conv", "c"
    joined = joined_biases(separate_biases(model))
    assert [each.name for each in joined.graph.output] == ["c"]
    np.testing.assert_array_equal(run(joined, NONE), run(model, NONE))


def test_other_sums_stay():
    model = linear()
    nodes(model)["c"].name = "head/Add"
    assert [node.op_type for node in joined_biases(model).graph.node] == [node.op_type for node in model.graph.node]
