"""Attention with its products as one kernel of ONNX Runtime, against the same graph run node by node."""

import numpy as np
import onnx
import pytest

from deploy.graph.integer_kernels import integer_kernels
from deploy.measure.accuracy import sqnr_db
from deploy.measure.ort_options import saturates
from tests.unit.deploy.graph.test_integer_kernels import run_whole
from tests.unit.deploy.graph.test_split_channel_scales import codes, model_from_text, run

pytestmark = pytest.mark.skipif(saturates(), reason="the unsigned kernels of ONNX Runtime saturate on this processor")

TOKENS, HEADS, WIDTH = 7, 2, 4
CHANNELS = HEADS * WIDTH
EXACT_DB = 100  # the order of FP32 sums

LINEAR = "m = MatMul(dq, W)  qkv = Add(m, b)"
THREE = "p = Transpose<perm = [2, 0, 3, 1, 4]>(r)  q3, k3, v3 = Split<axis = 0, num_outputs = 3>(p)"
SQUEEZED = "q = Squeeze(q3, n0)  k = Squeeze(k3, n0)  v = Squeeze(v3, n0)"
SCORES = "kt = Transpose<perm = [0, 1, 3, 2]>(k)  s = MatMul(q, kt)  s2 = Mul(s, half)  a = Softmax(s2)"
JOINED = "o = MatMul(a, v)  ot = Transpose<perm = [0, 2, 1, 3]>(o)  y0 = Reshape(ot, joined)"
PACKED = f"{LINEAR}  r = Reshape(qkv, packed)  {THREE}  {SQUEEZED}"
INNERMOST = f"""{LINEAR}  r = Reshape(qkv, innermost)  p = Transpose<perm = [0, 2, 1, 3, 4]>(r)
    q = Gather<axis = 4>(p, i0)  k = Gather<axis = 4>(p, i1)  v = Gather<axis = 4>(p, i2)"""
SPLIT_LAST = """q1, k1, v1 = Split<axis = 2, num_outputs = 3>(qkv)
    q2 = Reshape(q1, apart)  k2 = Reshape(k1, apart)  v2 = Reshape(v1, apart)
    q = Transpose<perm = [0, 2, 1, 3]>(q2)  kt = Transpose<perm = [0, 2, 3, 1]>(k2)  v = Transpose<perm = [0, 2, 1, 3]>(v2)
    s = MatMul(q, kt)  s2 = Mul(s, half)  a = Softmax(s2)"""
SEPARATE = """mq = MatMul(dq, W1)  q1 = Add(mq, b1)  mk = MatMul(dq, W2)  k1 = Add(b2, mk)  v1 = MatMul(dq, W3)
    q2 = Reshape(q1, apart)  k2 = Reshape(k1, apart)  v2 = Reshape(v1, apart)
    q = Transpose<perm = [0, 2, 1, 3]>(q2)  kt = Transpose<perm = [0, 2, 3, 1]>(k2)  v = Transpose<perm = [0, 2, 1, 3]>(v2)
    s = MatMul(q, kt)  s2 = Mul(s, half)  a = Softmax(s2)"""
WRITTEN = {
    "packed, (3, heads, width)": f"{PACKED}  {SCORES}  {JOINED}",
    "packed, (heads, width, 3)": f"{INNERMOST}  {SCORES}  {JOINED}",
    "split along channels": f"{LINEAR}  {SPLIT_LAST}  {JOINED}",
    "three products": f"{SEPARATE}  {JOINED}",
    "no bias": f"qkv = MatMul(dq, W)  {SPLIT_LAST}  {JOINED}",
    "factors of q and k": f"{PACKED}  {SCORES}  {JOINED}".replace("MatMul(q, kt)", "MatMul(qs, kt)")
    .replace("kt = Transpose", "qs = Mul(third, q)  ks = Div(k, third)  kt = Transpose").replace("3, 2]>(k)", "3, 2]>(ks)"),
    "a factor of v": f"{PACKED}  {SCORES}  {JOINED}".replace("o = MatMul(a, v)", "vs = Mul(v, third)  o = MatMul(a, vs)"),
    "scores as they are": f"{PACKED}  {SCORES}  {JOINED}".replace("s2 = Mul(s, half)  a = Softmax(s2)", "a = Softmax(s)"),
}  # fmt: skip
OTHERS = {
    "a bias of the scores": f"{PACKED}  {SCORES}  {JOINED}".replace("Mul(s, half)", "Add(s, scores)"),
    "queries that are normalized": f"{PACKED}  {SCORES}  {JOINED}".replace(
        "kt = Transpose", "qn = LayerNormalization(q, gain)  kt = Transpose"
    ).replace("MatMul(q, kt)", "MatMul(qn, kt)"),
    "a factor per channel": f"{PACKED}  {SCORES}  {JOINED}".replace(
        "kt = Transpose", "qn = Mul(q, gain)  kt = Transpose"
    ).replace("MatMul(q, kt)", "MatMul(qn, kt)"),
    "heads that change places": f"{PACKED}  {SCORES}  {JOINED}".replace("[0, 2, 1, 3]>(o)", "[0, 2, 3, 1]>(o)"),
    "other tokens": f"{PACKED}  {SCORES}  {JOINED}".replace(
        "kt = Transpose<perm = [0, 1, 3, 2]>(k)",
        "kb = Gather<axis = 2>(k, back)  kt = Transpose<perm = [0, 1, 3, 2]>(kb)",
    ),
    "softmax over queries": f"{PACKED}  {SCORES}  {JOINED}".replace("Softmax(s2)", "Softmax<axis = 2>(s2)"),
    "weights that are read twice": f"{PACKED}  {SCORES}  {JOINED}".replace("MatMul(a, v)", "MatMul(a, v2)").replace(
        "o = MatMul", "av = MatMul(a, a)  v2 = MatMul(av, v)  o = MatMul"
    ),
}


def network(body):
    """An attention whose input, weights and biases come from the seed."""
    rng = np.random.default_rng(0)
    weight = codes(np.random.default_rng(1), CHANNELS, 3 * CHANNELS)
    text = "q8 = QuantizeLinear(x, s0, zero)  dq = DequantizeLinear(q8, s0, zero)"
    for name in ("W", "W1", "W2", "W3"):
        if f"(dq, {name})" in body:
            text += f"  {name} = DequantizeLinear<axis = 1>(w{name[1:]}, ws{name[1:]})"
    scales = rng.uniform(0.004, 0.01, 3 * CHANNELS).astype(np.float32)
    bias = rng.normal(0, 0.5, 3 * CHANNELS).astype(np.float32)
    thirds = {
        f"{name}{part + 1}": np.ascontiguousarray(array[..., part * CHANNELS : (part + 1) * CHANNELS])
        for name, array in {"w": weight, "ws": scales, "b": bias}.items()
        for part in range(3)
    }
    given = thirds | {
        "zero": np.int8(0), "s0": np.float32(0.02), "w": weight, "ws": scales, "b": bias, "half": np.float32(0.5),
        "third": np.float32(0.3), "n0": np.array([0]), "i0": np.int64(0), "i1": np.int64(1), "i2": np.int64(2),
        "packed": np.array([-1, TOKENS, 3, HEADS, WIDTH]), "innermost": np.array([-1, TOKENS, HEADS, WIDTH, 3]),
        "apart": np.array([-1, TOKENS, HEADS, WIDTH]), "joined": np.array([-1, TOKENS, CHANNELS]),
        "scores": rng.normal(0, 1, (TOKENS, TOKENS)).astype(np.float32),
        "gain": rng.normal(1, 0.3, WIDTH).astype(np.float32), "back": np.arange(TOKENS)[::-1].copy(),
    }  # fmt: skip
    shape = f"FLOAT[B,{TOKENS},{CHANNELS}]"
    return onnx.shape_inference.infer_shapes(
        model_from_text(np.float32, f"{shape} x", f"{shape} y", f"{text}  {body}  y = Add(y0, x)", given)
    )


def tokens():
    return np.random.default_rng(2).normal(size=(3, TOKENS, CHANNELS)).astype(np.float32)


@pytest.mark.parametrize("body", WRITTEN.values(), ids=WRITTEN)
def test_attention_is_one_kernel_however_its_heads_are_written(body):
    model = network(body)
    rewritten, written = integer_kernels(model)
    onnx.checker.check_model(rewritten)
    assert written == {"QAttention": 1}
    assert not {"Softmax", "MatMul", "Transpose"} & {node.op_type for node in rewritten.graph.node}
    exact = run(model, tokens())
    for found in (run(rewritten, tokens()), run_whole(rewritten, tokens())):
        assert sqnr_db(exact, found) > EXACT_DB


@pytest.mark.parametrize("body", OTHERS.values(), ids=OTHERS)
def test_other_attention_stays_and_computes_the_same(body):
    model = network(body)
    rewritten, written = integer_kernels(model)
    assert set(written) == {"MatMulIntegerToFloat"}
    assert sqnr_db(run(model, tokens()), run(rewritten, tokens())) > EXACT_DB


HEADS_FIRST = f"{INNERMOST}  {SCORES}  {JOINED}"
READ_TWICE = {
    "a product of the same projection is left": (
        HEADS_FIRST.replace("y0 =", "yt =") + "  q1, k1, v1 = Split<axis = 2, num_outputs = 3>(qkv)  y0 = Add(yt, v1)",
        {"QAttention": 1, "MatMulIntegerToFloat": 1},
    ),
    "two attentions of one projection": (
        f"{PACKED}  {SCORES}  {JOINED}".replace("y0 =", "yt =")
        + "  sc = MatMul(q, kt)  s3 = Mul(sc, third)  a3 = Softmax(s3)  o3 = MatMul(a3, v)"
        "  ot3 = Transpose<perm = [0, 2, 1, 3]>(o3)  y3 = Reshape(ot3, joined)  y0 = Add(yt, y3)", {"QAttention": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("body", "expected"), READ_TWICE.values(), ids=READ_TWICE)
def test_what_else_reads_the_projection_computes_the_same(body, expected):
    model = network(body)
    rewritten, written = integer_kernels(model)
    assert written == expected
    exact = run(model, tokens())
    for found in (run(rewritten, tokens()), run_whole(rewritten, tokens())):
        assert sqnr_db(exact, found) > EXACT_DB


def test_the_kernel_names_every_product_that_it_computes():
    three, packed = (
        [node for node in integer_kernels(network(WRITTEN[which]))[0].graph.node if node.op_type == "QAttention"]
        for which in ("three products", "no bias")
    )
    assert len(three) == len(packed) == 1
    assert three[0].name.count("+") == 2
    assert packed[0].name.count("+") == 0
