import json
from functools import cache

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calib.errors import UserError
from deploy.engine.audit import audit, planned_attention, planned_layers, require_int8
from deploy.engine.backends import tensorrt_rtx
from deploy.engine.build import Profile
from deploy.engine.kernels import Kernel, bytes_moved
from deploy.engine.plan_text import kernels_from_rtx_plan
from deploy.errors import ContractError

SCALE, ZERO = np.float16(0.02), np.int8(0)


def weight(*shape, dtype=np.float16):
    values = np.random.default_rng(0).integers(-100, 100, shape)
    return values.astype(dtype) * (1 if dtype == np.int8 else dtype(0.01))


def graph(text, **initializers):
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}')
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in initializers.items())
    onnx.checker.check_model(model)
    return model


def chain(float_type, dtype):
    return graph(
        f"g ({float_type}[N,64] x) => ({float_type}[N,64] y) "
        "{ [a] h = MatMul(x, w1) [r] k = Relu(h) [b] y = MatMul(k, w2) }",
        w1=weight(64, 128, dtype=dtype),
        w2=weight(128, 64, dtype=dtype),
    )


def int8_chain(broken=False):
    """Two INT8 layers; broken: the second one has an FP16 weight."""
    second = "" if broken else "[b_dq] v2 = DequantizeLinear(w2, s, z)"
    return graph(
        "g (float16[N,64] x) => (float16[N,64] y) {"
        "[a_q] x8 = QuantizeLinear(x, s, z) [a_d] xd = DequantizeLinear(x8, s, z)"
        "[a_dq] v1 = DequantizeLinear(w1, s, z) [a] h = MatMul(xd, v1) [r] k = Relu(h)"
        "[b_q] k8 = QuantizeLinear(k, s, z) [b_d] kd = DequantizeLinear(k8, s, z)"
        f"{second} [b] y = MatMul(kd, {'w2' if broken else 'v2'}) }}",
        w1=weight(64, 128, dtype=np.int8),
        w2=weight(128, 64, dtype=np.float16 if broken else np.int8),
        s=SCALE,
        z=ZERO,
    )


def int8_convs():
    return graph(
        "g (float16[N,32,16,16] x) => (float16[N,32,16,16] y) {"
        "[q1] x8 = QuantizeLinear(x, s, z) [d1] xd = DequantizeLinear(x8, s, z)"
        "[w1_d] v1 = DequantizeLinear<axis=0>(w1, sc, zc) [conv] h = Conv<pads=[1,1,1,1]>(xd, v1, b1)"
        "[r] k = Relu(h) [q2] k8 = QuantizeLinear(k, s, z) [d2] kd = DequantizeLinear(k8, s, z)"
        "[w2_d] v2 = DequantizeLinear(w2, s, z) [depthwise] y = Conv<pads=[1,1,1,1], group=32>(kd, v2) }",
        w1=weight(32, 32, 3, 3, dtype=np.int8),
        w2=weight(32, 1, 3, 3, dtype=np.int8),
        b1=weight(32),
        s=SCALE,
        z=ZERO,
        sc=np.full(32, SCALE),
        zc=np.zeros(32, np.int8),
    )


@cache
def rtx():
    return pytest.importorskip("tensorrt_rtx")


def built(model, targets=("SM89",), largest=(32,)):
    """Engine with one optimization profile for each of the `largest` batches."""
    trt = rtx()
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        config.set_compute_capability(getattr(trt.ComputeCapability, target), index)
    tensor = network.get_input(0)
    for batch in largest:
        profile = builder.create_optimization_profile()
        profile.set_shape(tensor.name, *((n, *tensor.shape[1:]) for n in (1, 8, batch)))
        config.add_optimization_profile(profile)
    return bytes(builder.build_serialized_network(network, config))


def audited(model, plan_of=None, **settings):
    """Audit of `model` against the plan of another graph, `plan_of`, if given."""
    return audit(kernels_from_rtx_plan(built(model, **settings)), planned_layers(plan_of or model))


def test_int8_chain_is_int8():
    result = audited(int8_chain())
    assert (result.int8_gemms, result.fp16_gemms, result.fp32_gemms) == (2, 0, 0)
    assert (result.planned, result.lost, result.unproven) == (2, (), 0)
    require_int8(result)


def test_fp16_graph_has_fp16_gemms_only():
    result = audited(chain("float16", np.float16))
    assert (result.int8_gemms, result.fp16_gemms, result.fp32_gemms, result.planned) == (0, 2, 0, 0)


def test_fp32_graph_has_fp32_gemms():
    result = audited(chain("float", np.float32))
    assert (result.int8_gemms, result.fp16_gemms, result.fp32_gemms) == (0, 0, 2)


def test_bytes_and_multiply_adds_of_an_engine():
    kernels = kernels_from_rtx_plan(built(int8_chain()))
    quantize, first, second = 64 * 2 + 64, 64 + 64 * 128 + 128, 128 + 128 * 64 + 64 * 2
    scalars = 2 + 4 * 4  # the scale of the first, alpha and beta of both products
    for batch in (1, 8):
        weights = 64 * 128 + 128 * 64
        assert bytes_moved(kernels, batch) == batch * (quantize + first + second - weights) + weights + scalars
    assert sum(kernel.macs or 0 for kernel in kernels) == 64 * 128 + 128 * 64


def int8_attention(masked):
    """Attention of 4 heads with q, k, softmax, v and output in INT8, and a layer that reads it."""
    quantized = "".join(
        f"[{name}_q] {name}8 = QuantizeLinear({source}, s, z) [{name}_d] {name}d = DequantizeLinear({name}8, s, z)"
        for name, source in (("q", "a"), ("k", "b"), ("v", "c"))
    )
    return graph(
        "g (float16[N,4,64,32] a, float16[N,4,32,64] b, float16[N,4,64,32] c) => (float16[N,4,64,16] y) {"
        f"{quantized} [scores] h = MatMul(qd, kd) [bias] h1 = {'Add(h, m)' if masked else 'Mul(h, s)'}"
        "[softmax] p = Softmax<axis=-1>(h1) [p_q] p8 = QuantizeLinear(p, s, z) [p_d] pd = DequantizeLinear(p8, s, z)"
        "[mix] o = MatMul(pd, vd) [o_q] o8 = QuantizeLinear(o, s, z) [o_d] od = DequantizeLinear(o8, s, z)"
        "[w_d] wd = DequantizeLinear(w, s, z) [proj] y = MatMul(od, wd) }",
        w=weight(32, 16, dtype=np.int8),
        s=SCALE,
        z=ZERO,
        **({"m": weight(1, 4, 64, 64)} if masked else {}),
    )


@pytest.mark.parametrize("masked", [False, True])
def test_int8_attention_is_int8_with_and_without_a_mask(masked):
    model = int8_attention(masked)
    plan = tensorrt_rtx.build(model, Profile(), (89,)).plan
    [attention] = [kernel for kernel in kernels_from_rtx_plan(plan) if kernel.kind == "attention"]
    assert (attention.precision, len(attention.reads)) == ("int8", 4 if masked else 3)
    assert attention.macs == 2 * 4 * 64 * 64 * 32
    require_int8(audit(kernels_from_rtx_plan(plan), planned_layers(model), planned_attention(model)))


def test_a_layer_without_quantized_weight_is_lost_by_name():
    result = audited(int8_chain(broken=True), plan_of=int8_chain())
    assert (result.lost, result.int8_gemms, result.fp16_gemms) == (("b",), 1, 1)
    with pytest.raises(ContractError, match=r"1 of 2 planned layers do not run in an INT8 kernel: b;"):
        require_int8(result)


def test_convolutions():
    result = audited(int8_convs())
    assert (result.int8_convs, result.fp16_convs, result.fp32_convs, result.int8_gemms) == (2, 0, 0, 0)
    assert (result.planned, result.lost) == (2, ())


def test_one_kernel_for_three_layers():
    names = ("q", "k", "v")
    layers = " ".join(f"[{n}_d] w{n} = DequantizeLinear({n}8, s, z) [{n}] {n}h = MatMul(xd, w{n})" for n in names)
    model = graph(
        "g (float16[N,49,64] x) => (float16[N,49,64] y) {"
        f"[x_q] x8 = QuantizeLinear(x, s, z) [x_d] xd = DequantizeLinear(x8, s, z) {layers}"
        "[add] t = Add(qh, kh) [mul] y = Mul(t, vh) }",
        **{f"{n}8": weight(64, 64, dtype=np.int8) for n in names},
        s=SCALE,
        z=ZERO,
    )
    result = audited(model)
    assert (result.int8_gemms, result.planned, result.lost) == (1, 3, ())


def test_targets_and_profiles_do_not_multiply_kernels():
    for model, plan_of in ((int8_chain(), None), (int8_chain(broken=True), int8_chain())):
        once = audited(model, plan_of)
        assert audited(model, plan_of, targets=("SM86", "SM89", "SM120")) == once
        assert audited(model, plan_of, largest=(32, 128)) == once


def test_a_cast_at_the_border_is_counted():
    model = graph(
        "g (float[N,64] x) => (float16[N,64] y) { [c] h = Cast<to=10>(x) [a] y = MatMul(h, w) }",
        w=weight(64, 64),
    )
    assert audited(model).casts == 1


def test_an_engine_cut_off_in_its_program_is_an_error():
    plan = built(int8_chain())
    with pytest.raises(UserError, match="parts of it"):
        kernels_from_rtx_plan(plan[: plan.index(b"\nmain {") + 40])


PLANNED = {
    "plain": ("[d] xd = DequantizeLinear(x8, s, z)", "[w] v = DequantizeLinear(w8, s, z)"),
    "reshaped activation": (
        "[d] e = DequantizeLinear(x8, s, z) [t] f = Transpose<perm=[0,1]>(e) [r] xd = Reshape(f, shape)",
        "[w] v = DequantizeLinear(w8, s, z)",
    ),
    "reshaped integers": (
        "[r] r8 = Reshape(x8, shape) [d] xd = DequantizeLinear(r8, s, z)",
        "[w] v = DequantizeLinear(w8, s, z)",
    ),
    "transposed weight": (
        "[d] xd = DequantizeLinear(x8, s, z)",
        "[w] v0 = DequantizeLinear(w8, s, z) [t] v = Transpose(v0)",
    ),
}
NOT_PLANNED = {
    "float activation": ("[i] xd = Identity(x)", "[w] v = DequantizeLinear(w8, s, z)"),
    "float weight": ("[d] xd = DequantizeLinear(x8, s, z)", "[i] v = Identity(w16)"),
    "weight quantized at run time": (
        "[d] xd = DequantizeLinear(x8, s, z)",
        "[q0] v8 = QuantizeLinear(w16, s, z) [w] v = DequantizeLinear(v8, s, z)",
    ),
    "uint8 weight": ("[d] xd = DequantizeLinear(x8, s, z)", "[w] v = DequantizeLinear(wu, s, zu)"),
    "activation computed after DequantizeLinear": (
        "[d] e = DequantizeLinear(x8, s, z) [n] xd = Relu(e)",
        "[w] v = DequantizeLinear(w8, s, z)",
    ),
    "activation stored as integers": (
        "[d] xd = DequantizeLinear(w8, s, z)",
        "[w] v = DequantizeLinear(w8, s, z)",
    ),
}


def one_layer(activation, weights, layer="[fc] y = MatMul(xd, v)"):
    return graph(
        "g (float16[64,64] x) => (float16[64,64] y) {"
        f"[q] x8 = QuantizeLinear(x, s, z) {activation} {weights} {layer} }}",
        w8=weight(64, 64, dtype=np.int8),
        wu=np.ones((64, 64), np.uint8),
        w16=weight(64, 64),
        shape=np.array([64, 64]),
        s=SCALE,
        z=ZERO,
        zu=np.uint8(0),
    )


@pytest.mark.parametrize("name", PLANNED)
def test_planned(name):
    assert planned_layers(one_layer(*PLANNED[name])) == ("fc",)
    assert planned_layers(one_layer(*PLANNED[name], layer="[fc] y = Gemm<transB=1>(xd, v)")) == ("fc",)


@pytest.mark.parametrize("name", NOT_PLANNED)
def test_not_planned(name):
    assert planned_layers(one_layer(*NOT_PLANNED[name])) == ()


@pytest.mark.parametrize("layer", ["y = MatMul(xd, v)", "[q] y = MatMul(xd, v)"], ids=["none", "shared"])
def test_planned_nodes_need_names_of_their_own(layer):
    with pytest.raises(UserError, match="a name of its own"):
        planned_layers(one_layer(*PLANNED["plain"], layer=layer))


def kernel(kind, *inputs, layers=()):
    return Kernel("k", kind, inputs, ("fp16",), layers)


GOOD = (
    kernel("gemm", "int8", "int8", "fp32", layers=("fc1", "fc1/DequantizeLinear")),
    kernel("other", "int8", layers=("fc2",)),
    kernel("gemm", "int8", "int8", "fp32", layers=("fc2", "fc3")),
    kernel("attention", "fp16", "fp16", "fp16"),
    kernel("attention", "int8", "int8", "int8"),
    kernel("cast", "fp32"),
)


def test_numbers_and_words():
    result = audit((*GOOD, kernel("conv", "fp16", "fp16"), kernel("conv", "int8", "int8")), ("fc1", "fc2", "fc3"))
    assert result.summary() == (
        "3 of 3 planned layers have a kernel with INT8 operands (2 GEMMs, 1 convolutions); "
        "2 fused attention kernels, 1 of them in INT8; 0 FP16 GEMMs and 1 FP16 convolutions; "
        "0 FP32 GEMMs and 0 FP32 convolutions; 8 kernels"
    )
    assert (result.casts, result.unproven) == (1, 0)
    assert json.loads(json.dumps(result.to_json())) == result.to_json()
    require_int8(result)


def test_only_int8_products_cover_a_layer():
    """An activation function that lists fc2 and an attention over INT8 are no proof for fc2 or fc4."""
    no_proof = (*GOOD[:2], kernel("attention", "int8", "int8", "int8", layers=("fc4",)))
    assert audit(no_proof, ("fc1", "fc2", "fc4")).lost == ("fc2", "fc4")


FAULTS = {
    "lost": (GOOD[:2], ("fc1", "fc2"), "1 of 2 planned layers do not run in an INT8 kernel: fc2;"),
    "fp32 gemm": (
        (*GOOD, kernel("gemm", "fp16", "fp32")),
        ("fc1",),
        "1 GEMMs and 0 convolutions run in FP32",
    ),
    "fp32 conv": (
        (*GOOD, kernel("conv", "fp32", "fp32")),
        ("fc1",),
        "0 GEMMs and 1 convolutions run in FP32",
    ),
    "unread": (
        (*GOOD, kernel("gemm", "unknown", "int8")),
        ("fc1",),
        "1 kernels that run planned layers",
    ),
    "nothing planned": (GOOD, (), "plans no layer"),
    "many lost": ((), tuple(f"fc{i}" for i in range(9)), r"9 of 9 .*: fc0, fc1, fc2, fc3, fc4, \.\.; check"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_raised(name):
    kernels, planned, message = FAULTS[name]
    result = audit(kernels, planned)
    with pytest.raises(ContractError, match=message):
        require_int8(result)
