"""One minimal graph per mistake; the parser of TensorRT-RTX says which of them it refuses."""

import numpy as np
import onnx
import pytest

from calib.errors import UserError
from deploy.graph.check import RULES, check_strongly_typed, require_strongly_typed

HALF = np.float16(0.5)
HALVES = np.full(4, 0.5, np.float16)
CODES = np.ones((4, 4), np.int8)
KERNELS = np.ones((4, 4, 1, 1), np.int8)
DEFAULTS = {"s": HALF, "zero": np.int8(0), "codes": CODES, "scales": HALVES}
QDQ = "q = QuantizeLinear(x, s, zero)  y = DequantizeLinear(q, s, zero)"
SQUARE = {"x": "float16[4,4] x", "y": "float16[4,4] y"}
IMAGES = {"x": "float16[B,4,8,8] x", "y": "float16[B,4,8,8] y"}


def graph(body, x="float16[B,4] x", y="float16[B,4] y", opset=21, functions="", **initializers):
    """A model of ONNX text; nodes are called after their outputs, DEFAULTS fill what nothing else defines."""
    opsets = f'["" : {opset}, "our" : 1]'
    model = onnx.parser.parse_model(
        f"<ir_version: 10, opset_import: {opsets}> g ({x}) => ({y}) {{ {body} }} {functions}"
    )
    read = {name for node in model.graph.node for name in node.input} - {i.name for i in model.graph.input}
    tensors = {name: value for name, value in DEFAULTS.items() if name in read} | initializers
    for name, value in tensors.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    for node in model.graph.node:
        node.name = node.output[0]
    return model


def weight(axis, consumer, **options):
    return graph(f"w = DequantizeLinear<axis = {axis}>(codes, scales)  y = {consumer}", **options)


GOOD = {
    "LayerNormalization, Q/DQ, MatMul, bias": graph(
        """norm = LayerNormalization(x, gamma, bias)
        q = QuantizeLinear(norm, s, zero)  d = DequantizeLinear(q, s, zero)
        w = DequantizeLinear<axis = -1>(codes, scales)  m = MatMul(d, w)  y = Add(m, bias)""",
        gamma=HALVES,
        bias=HALVES,
    ),
    "scale in a Constant node, output_dtype instead of a zero point": graph(
        """c = Constant<value = float16 {1}>()
        q = QuantizeLinear<output_dtype = 3>(x, c)  y = DequantizeLinear(q, c)"""
    ),
    "Q directly before a Transpose of activations": graph(
        "q = QuantizeLinear(x, s, zero)  t = Transpose<perm = [0, 1]>(q)  y = DequantizeLinear(t, s, zero)"
    ),
    "per-channel weight, quantized in the graph": graph(
        """q = QuantizeLinear<axis = 1>(f, scales, zeros)
        w = DequantizeLinear<axis = 1>(q, scales)  y = MatMul(x, w)""",
        f=np.ones((4, 4), np.float16),
        zeros=np.zeros(4, np.int8),
    ),
    "per-tensor weight, where the axis means nothing": weight(0, "MatMul(x, w)", scales=HALF),
    "weight [N,K] through a Transpose": graph(
        "d = DequantizeLinear<axis = 0>(codes, scales)  w = Transpose(d)  y = MatMul(x, w)"
    ),
    "weight [N,K], transposed before it is dequantized": graph(
        "t = Transpose(codes)  w = DequantizeLinear<axis = 1>(t, scales)  y = MatMul(x, w)"
    ),
    "weight on the left, scales per row": weight(0, "MatMul(w, x)", **SQUARE),
    "Gemm transB=1": weight(0, "Gemm<transB = 1>(x, w, bias)", bias=HALVES),
    "Gemm transB=0": weight(1, "Gemm(x, w)"),
    "Gemm, weight on the left": weight(0, "Gemm(w, x)", **SQUARE),
    "Gemm transA=1, weight on the left": weight(1, "Gemm<transA = 1>(w, x)", **SQUARE),
    "Conv": weight(0, "Conv(x, w)", codes=KERNELS, **IMAGES),
    "Cast between integers and from integers to FP16": graph(
        "n = Shape<end = 1>(x)  i = Cast<to = 6>(n)  f = Cast<to = 10>(i)  y = Mul(x, f)"
    ),
}


@pytest.mark.parametrize("model", GOOD.values(), ids=GOOD)
def test_good_graph_has_no_finding(model):
    assert check_strongly_typed(model) == ()
    require_strongly_typed(model)


def both(finding):
    """The finding for the QuantizeLinear and the DequantizeLinear of QDQ."""
    return [f"{name}: {finding}" for name in "qy"]


def islands(dtype, names):
    return [f"{name}: type {dtype}, expected FLOAT16" for name in names]


# rule -> case -> (graph, all findings)
BAD = {
    "opset_is_current": {
        "opset 20": (graph("y = Relu(x)", opset=20), ["opset: 20, expected 21 or newer"]),
    },
    "graph_is_flat": {
        "If": (
            graph(
                """y = If(c) <then_branch = t () => (float16[4] a) { a = Identity(v) },
                              else_branch = e () => (float16[4] b) { b = Neg(v) }>""",
                x="bool c",
                y="float16[4] y",
                v=HALVES,
            ),
            ["y: If with a subgraph, expected a graph without control flow"],
        ),
        "local function": (
            graph(
                "y = our.Twice(x)",
                functions='<opset_import: ["" : 21], domain: "our"> Twice (a) => (b) { b = Add(a, a) }',
            ),
            ["Twice: a local function, expected its nodes inlined"],
        ),
    },
    "floats_have_one_type": {
        "FP32 initializer": (
            graph("y = Identity(x)", unused=np.ones(4, np.float32)),
            islands("FLOAT", ["unused"]),
        ),
        "FP32 input and what follows": (
            graph("r = Relu(x)  y = Neg(r)", x="float[B,4] x", y="float[B,4] y"),
            islands("FLOAT", "xry"),
        ),
        "FP64 intermediate": (
            graph("n = Shape(x)  i = Cast<to = 11>(n)  y = Cast<to = 7>(i)", y="int64[2] y"),
            islands("DOUBLE", "i"),
        ),
        "BF16 intermediate": (
            graph("n = Shape(x)  i = Cast<to = 16>(n)  y = Cast<to = 7>(i)", y="int64[2] y"),
            islands("BFLOAT16", "i"),
        ),
        "operator of unknown type": (
            graph("mystery = our.Plugin(x)  y = CastLike(mystery, x)"),
            ["mystery: type cannot be inferred, expected standard ONNX operators"],
        ),
    },
    "nothing_casts_floats": {
        "FP16 to FP16": (
            graph("c = Cast<to = 10>(x)  y = Relu(c)"),
            ["c: Cast from FLOAT16 to FLOAT16, expected one float type throughout"],
        ),
        "CastLike": (
            graph("c = CastLike(x, x)  y = Relu(c)"),
            ["c: CastLike from FLOAT16 to FLOAT16, expected one float type throughout"],
        ),
        "after DequantizeLinear": (
            graph(
                "q = QuantizeLinear(x, s, zero)  d = DequantizeLinear(q, s, zero)  y = Cast<to = 6>(d)",
                y="int32[B,4] y",
            ),
            ["y: Cast after d, expected its consumer there"],
        ),
    },
    "scales_are_constants": {
        "run-time scale": (
            graph(QDQ, x="float16[B,4] x, float16 s"),
            both("scale computed at run time, expected an initializer"),
        ),
        "FP32 scale": (
            graph("w = DequantizeLinear(codes, s)  y = Shape(w)", y="int64[2] y", s=np.float32(1)),
            [*islands("FLOAT", "sw"), "w: scale of float32, expected float16"],
        ),
        "scale 0": (graph(QDQ, s=np.float16(0)), both("scale 0.0, expected finite and above zero")),
        "scale below 0": (graph(QDQ, s=-HALF), both("scale -0.5, expected finite and above zero")),
        "scale NaN": (graph(QDQ, s=np.float16(np.nan)), both("scale nan, expected finite and above zero")),
        "scale Inf in one channel": (
            weight(1, "MatMul(x, w)", scales=np.array([1, 1, np.inf, 1], np.float16)),
            ["w: scale inf, expected finite and above zero"],
        ),
    },
    "zero_points_are_zero": {
        "uint8": (graph(QDQ, zero=np.uint8(0)), both("zero point of UINT8, expected INT8")),
        "not zero": (graph(QDQ, zero=np.int8(3)), both("zero point 3, expected 0")),
        "missing in QuantizeLinear": (
            graph("q = QuantizeLinear(x, s)  y = DequantizeLinear(q, s)"),
            ["q: no zero point (ONNX: uint8), expected an int8 zero or output_dtype=INT8"],
        ),
        "output_dtype is uint8": (
            graph("q = QuantizeLinear<output_dtype = 2>(x, s)  y = DequantizeLinear(q, s)"),
            ["q: no zero point (ONNX: uint8), expected an int8 zero or output_dtype=INT8"],
        ),
        "run-time zero point": (
            graph(QDQ, x="float16[B,4] x, int8 zero"),
            both("zero point computed at run time, expected an int8 zero"),
        ),
    },
    "integers_are_int8": {
        "int32 bias": (
            graph("b = DequantizeLinear(bias, s)  y = Add(x, b)", bias=np.ones(4, np.int32)),
            ["b: dequantizes INT32, expected INT8 (a bias stays FP16)"],
        ),
        "uint8 weight": (
            graph("w = DequantizeLinear(codes, s)  y = MatMul(x, w)", codes=CODES.astype(np.uint8)),
            ["w: dequantizes UINT8, expected INT8 (a bias stays FP16)"],
        ),
    },
    "activations_have_one_scale": {
        "scale per channel": (
            graph(QDQ, s=HALVES, zero=np.zeros(4, np.int8)),
            both("4 scales for an activation, expected one"),
        ),
    },
    "weight_axis_is_output_channel": {
        "MatMul [K,N] on K": (
            weight(0, "MatMul(x, w)"),
            ["w: scales on axis 0 of the weight of y, expected 1"],
        ),
        "MatMul [N,K] on K, through a Transpose": (
            graph("d = DequantizeLinear<axis = 1>(codes, scales)  w = Transpose(d)  y = MatMul(x, w)"),
            ["d: scales on axis 0 of the weight of y, expected 1"],
        ),
        "MatMul of a weight on the left": (
            weight(1, "MatMul(w, x)", **SQUARE),
            ["w: scales on axis 1 of the weight of y, expected 0"],
        ),
        "Gemm transB=1 on K": (
            weight(1, "Gemm<transB = 1>(x, w)"),
            ["w: scales on axis 1 of the weight of y, expected 0"],
        ),
        "Gemm transB=0 on K": (
            weight(-2, "Gemm(x, w)"),
            ["w: scales on axis 0 of the weight of y, expected 1"],
        ),
        "Gemm of a weight on the left": (
            weight(1, "Gemm(w, x)", **SQUARE),
            ["w: scales on axis 1 of the weight of y, expected 0"],
        ),
        "Gemm transA=1 of a weight on the left": (
            weight(0, "Gemm<transA = 1>(w, x)", **SQUARE),
            ["w: scales on axis 0 of the weight of y, expected 1"],
        ),
        "Conv on the input channel, the axis by default": (
            graph("w = DequantizeLinear(codes, scales)  y = Conv(x, w)", codes=KERNELS, **IMAGES),
            ["w: scales on axis 1 of the weight of y, expected 0"],
        ),
    },
    "layer_norms_have_one_type": {
        "FP32 gamma": (
            graph("y = LayerNormalization(x, gamma)", gamma=np.ones(4, np.float32)),
            [
                *islands("FLOAT", ["gamma"]),
                "y: input, scale and bias of FLOAT16, FLOAT, expected one type",
            ],
        ),
    },
}
CASES = {f"{rule}: {case}": example for rule, cases in BAD.items() for case, example in cases.items()}


def test_every_rule_has_a_bad_graph():
    assert list(BAD) == [rule.__name__ for rule in RULES]


@pytest.mark.parametrize(("model", "findings"), CASES.values(), ids=CASES)
def test_mistake_is_reported_by_name_and_nothing_else_is(model, findings):
    assert list(check_strongly_typed(model)) == findings


def test_recorded_types_are_not_believed_and_the_model_stays_as_it_is():
    model = graph("n = Shape(x)  f = Cast<to = 1>(n)  y = Cast<to = 7>(f)", y="int64[2] y")
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("f", onnx.TensorProto.FLOAT16, [2]))
    before = model.SerializeToString(deterministic=True)
    assert list(check_strongly_typed(model)) == islands("FLOAT", "f")
    assert model.SerializeToString(deterministic=True) == before


def test_error_counts_all_findings_and_tells_three_in_one_line():
    model = graph("a = Relu(x)  b = Relu(a)  c = Relu(b)  y = Relu(c)", x="float[B,4] x", y="float[B,4] y")
    with pytest.raises(UserError) as caught:
        require_strongly_typed(model)
    text = str(caught.value)
    assert f"5 findings: {'; '.join(islands('FLOAT', 'xab'))}; and 2 more." in text
    assert "\n" not in text


def test_a_graph_of_fp32_types_is_held_to_them():
    model = graph("a = Relu(x)  y = Mul(a, f)", x="float[B,4] x", y="float[B,4] y", f=np.ones(4, np.float32))
    assert check_strongly_typed(model, half=False) == ()
    mixed = graph("f = Cast<to = 1>(x)  y = Relu(f)", y="float[B,4] y")
    assert check_strongly_typed(mixed, half=False) == (
        "x: type FLOAT16, expected FLOAT", "f: Cast from FLOAT16 to FLOAT, expected one float type throughout",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"strongly typed INT8/FP32 engine, 2 findings: .* Export it again in FP32"):
        require_strongly_typed(mixed, half=False)


def parser_accepts(model):
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    network = trt.Builder(logger).create_network(0)
    return trt.OnnxParser(network, logger).parse(model.SerializeToString())


@pytest.mark.parametrize("model", GOOD.values(), ids=GOOD)
def test_tensorrt_rtx_parses_good_graphs(model):
    assert parser_accepts(model)


REFUSED = {
    "floats_have_one_type: operator of unknown type",
    "scales_are_constants: scale 0",
    "scales_are_constants: scale below 0",
    "scales_are_constants: scale NaN",
    "zero_points_are_zero: not zero",
    "zero_points_are_zero: output_dtype is uint8",
    "integers_are_int8: int32 bias",
    "integers_are_int8: uint8 weight",
    "layer_norms_have_one_type: FP32 gamma",
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_tensorrt_rtx_refuses(case):
    assert not parser_accepts(CASES[case][0])


@pytest.mark.parametrize("case", [case for case in CASES if case not in REFUSED])
def test_tensorrt_rtx_parses_without_complaint_what_only_the_check_finds(case):
    assert parser_accepts(CASES[case][0])
