"""Program text written by hand; `test_audit.py` reads text that TensorRT-RTX wrote."""

import pytest

from calib.errors import UserError
from deploy.engine.kernels import kind_from_generated_name, layers_from_metadata
from deploy.engine.plan_text import kernels_from_rtx_plan

TYPES = {"x": "half", "x8": "int8", "w8": "int8", "w16": "half", "w32": "float", "a": "float", "y": "half"}


def listed(names):
    return "{" + " ".join(f'"{name}"' for name in names) + " }"


def op(operation, name, inputs, outputs=("y",), layers=()):
    suffix = "" if operation in ("fully_connected", "corrltn", "deconvolution") else "_args"
    quoted = f'"{name}"' if not suffix else name
    covered = "\x1f".join(f"[ONNX Layer: {layer}]" for layer in layers)
    return (
        f"  {operation}={{ name={quoted} output{suffix}={listed(outputs)} input{suffix}={listed(inputs)} "
        f'stream=0 kernel=stub layers="{covered}" }}'
    )


def program(*ops, outputs=("y",), accelerators="sm86 sm89 ", types=TYPES, views=()):
    described = [
        f'  tensor={{ alignment=2 dims={{ "n_proxy.1" 64 }} name="{name}" strides={{ 64 1 }} type={dtype} }}'
        for name, dtype in types.items()
    ] + [
        f'  sub_tensor={{ base="{base}" const_offset=0 name="{name}" offset=0 type={dtype} }}'
        for name, base, dtype in views
    ]
    sections = {
        "header": ["  version = 5", f"  outputs={listed(outputs)}", f"  accelerators={{{accelerators}}}"],
        "descriptors": described,
        "main": [" label bb1: ", *ops],
        "shape_main": [op("fully_connected", "on_the_host", ("w32", "w32"))],
    }
    return "".join(f"{name} {{\n" + "\n".join(lines) + "\n}\n" for name, lines in sections.items()).encode()


def plan(*programs):
    return b"ftrt\x00\xff\x01" + b"\x00NLYM\xa1".join(programs) + b"\x00weights\xfe"


def one(*ops, **settings):
    [kernel] = kernels_from_rtx_plan(plan(program(*ops, **settings)))
    return kernel


@pytest.mark.parametrize(
    ("operation", "inputs", "kind", "precision"),
    [
        ("fully_connected", ("x8", "w8", "a", "a"), "gemm", "int8"),
        ("fully_connected", ("x", "w16", "a", "a"), "gemm", "fp16"),
        ("fully_connected", ("x", "w32", "a", "a"), "gemm", "fp32"),
        ("fully_connected", ("x", "w8", "a", "a"), "gemm", "fp16"),
        ("fully_connected", ("x8", "w16", "a", "a"), "gemm", "fp16"),
        ("fully_connected", ("x8", "nowhere_described"), "gemm", "unknown"),
        ("fully_connected", ("x8",), "gemm", "unknown"),
        ("corrltn", ("x8", "w8", "a", "a", "w16"), "conv", "int8"),
        ("deconvolution", ("x", "w16", "a", "a"), "conv", "fp16"),
    ],
)
def test_products(operation, inputs, kind, precision):
    kernel = one(op(operation, "f", inputs, layers=("blocks.0/MatMul", "blocks.0/DequantizeLinear")))
    assert (kernel.name, kernel.kind, kernel.precision, kernel.outputs) == ("f", kind, precision, ("fp16",))
    assert kernel.layers == ("blocks.0/MatMul", "blocks.0/DequantizeLinear")


def test_a_view_has_the_type_of_its_own_description():
    views = [("x_2^deref", "x", "int8")]
    kernel = one(op("fully_connected", "f", ("x_2^deref", "w8")), views=views)
    assert kernel.inputs == ("int8", "int8")


def test_names_may_hold_braces_and_spaces():
    name = "{ForeignNode[a...b]} 1"
    kernel = one(op("fully_connected", "my layer", (name, "w8")), types=TYPES | {name: "int8"})
    assert (kernel.name, kernel.precision) == ("my layer", "int8")


def test_attention_is_int8_only_with_q_k_and_v():
    half = one(op("function", "_gemm_mha_v2", ("x8", "w8", "x")))
    full = one(op("function", "_gemm_mha_v2", ("x8", "w8", "q8")), types=TYPES | {"q8": "int8"})
    assert (half.kind, half.precision) == ("attention", "fp16")
    assert (full.kind, full.precision) == ("attention", "int8")


def test_masks_of_an_attention_lie_between_k_and_v():
    types = TYPES | {"mask": "half", "bias": "half", "v8": "int8"}
    full = one(op("function", "_gemm_mha_v2", ("x8", "w8", "mask", "bias", "v8")), types=types)
    half = one(op("function", "_gemm_mha_v2", ("x8", "w8", "w8", "mask")), types=types)
    assert (full.precision, full.inputs) == ("int8", ("int8", "int8", "int8", "fp16", "fp16"))
    assert half.precision == "fp16"


def test_what_is_no_launch_is_no_kernel():
    names = ("shape_call", "signal", "wait")
    assert one(*(op(name, name, ()) for name in names), op("maxpool", "pool", ("x",))).name == "pool"


FUSED = op("runtime_fusion", "__myl_CastMulFc", ("x8", "w8"), layers=("fc/MatMul", "fc/DequantizeLinear"))
CAST = op("cast", "cast", ("x8",), ("x",))


def inside(*ops, outputs=("y",)):
    return program(*ops, outputs=outputs, accelerators="*")


def test_a_fusion_multiplies_what_its_inside_multiplies():
    half = inside(CAST, op("fully_connected", "f", ("x", "w16")))
    int8 = inside(op("fully_connected", "f", ("x8", "w8")), CAST)
    both = inside(op("fully_connected", "f", ("x8", "w8")), op("fully_connected", "g", ("x", "w16")))
    for inner, precision in ((half, "fp16"), (int8, "int8"), (both, "fp16")):
        [kernel] = kernels_from_rtx_plan(plan(program(FUSED), inner))
        assert (kernel.kind, kernel.precision) == ("gemm", precision)
        assert kernel.layers == ("fc/MatMul", "fc/DequantizeLinear")


def test_a_fusion_without_an_inside_is_not_believed():
    stranger = inside(op("fully_connected", "f", ("x8", "w8")), outputs=("z",))
    for programs in ([program(FUSED)], [program(FUSED), stranger]):
        [kernel] = kernels_from_rtx_plan(plan(*programs))
        assert (kernel.kind, kernel.precision) == ("gemm", "unknown")


def test_a_fusion_that_reads_nothing_but_halves_multiplies_halves():
    assert one(op("runtime_fusion", "__myl_FcAdd", ("x", "w16"))).precision == "fp16"
    assert one(op("runtime_fusion", "__myl_FcAdd", ("x", "w32"))).precision == "unknown"
    assert one(op("runtime_fusion", "__myl_FcAdd", ("x8", "w16"))).precision == "unknown"


def test_an_inside_that_multiplies_nothing():
    resize = program(op("runtime_function", "__myl_Resi", ("x",)))
    [kernel] = kernels_from_rtx_plan(plan(resize, inside(op("resize", "up", ("x",)))))
    assert (kernel.kind, kernel.inputs) == ("other", ("fp16",))


def test_a_fusion_is_known_by_the_nodes_of_its_inside():
    int8 = inside(op("fully_connected", "f", ("x8", "w8"), layers=("fc/MatMul",)), outputs=("z",))
    other = inside(op("fully_connected", "f", ("x8", "w8"), layers=("fc2/MatMul",)), outputs=("z",))
    for inner, precision in ((int8, "int8"), (other, "unknown")):
        [kernel] = kernels_from_rtx_plan(plan(program(FUSED), inner))
        assert kernel.precision == precision


GOOD = program(op("fully_connected", "f", ("x8", "w8")))
PROFILE_1 = TYPES | {"y [profile 1].1": "half"}


def profile_1(*ops):
    return program(*ops, outputs=("y [profile 1].1",), types=PROFILE_1)


def test_copies_for_profiles_count_once_and_the_worst_counts():
    first = program(op("fully_connected", "f", ("x8", "w8"), ("y.1",)), outputs=("y.1",))
    same = profile_1(op("fully_connected", "f", ("x8", "w8"), ("y [profile 1].1",)))
    worse = profile_1(op("fully_connected", "f", ("x", "w16"), ("y [profile 1].1",)))
    worst = profile_1(op("fully_connected", "f", ("x", "w32"), ("y [profile 1].1",)))
    for copies, precision in (
        ((first, same), "int8"),
        ((first, worse), "fp16"),
        ((worse, first), "fp16"),
        ((worse, worst), "fp32"),
    ):
        assert [kernel.precision for kernel in kernels_from_rtx_plan(plan(*copies))] == [precision]


def test_each_copy_has_its_own_insides():
    outer = op("runtime_fusion", "__myl_CastMulFc", ("x8", "w8"), ("y.1",))
    copy = op("runtime_fusion", "__myl_CastMulFc", ("x8", "w8"), ("y [profile 1].1",))
    half = inside(op("fully_connected", "f", ("x", "w16"), ("y.1",)), outputs=("y.1",))
    int8 = program(
        op("fully_connected", "f", ("x8", "w8"), ("y [profile 1].1",)),
        outputs=("y [profile 1].1",),
        accelerators="*",
    )
    [kernel] = kernels_from_rtx_plan(plan(program(outer, outputs=("y.1",)), half, profile_1(copy), int8))
    assert kernel.precision == "fp16"


def test_programs_with_other_outputs_are_parts_of_one_engine():
    other = program(op("corrltn", "c", ("x8", "w8"), ("z",)), outputs=("z",))
    assert [kernel.kind for kernel in kernels_from_rtx_plan(plan(GOOD, other))] == ["gemm", "conv"]


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"not an engine",
        plan(GOOD).replace(b"main {\n", b"body {\n"),
        plan(GOOD)[: plan(GOOD).index(b"fully_connected")],
        plan(GOOD) + GOOD[: GOOD.index(b"fully_connected")],
    ],
    ids=["empty", "stranger", "other section", "truncated", "second program truncated"],
)
def test_text_that_is_missing_is_an_error_that_names_the_version(broken):
    with pytest.raises(UserError, match=r"tensorrt-rtx 1\.7"):
        kernels_from_rtx_plan(broken)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_gemm_mha_v2", "attention"),
        ("_gemv_mha_v1", "attention"),
        ("__mye8037_gemm_mha_v2", "attention"),
        ("kgen_mha_0", "attention"),
        ("mha.norm/LayerNormalization", "other"),
        ("__myl_FcAdd", "gemm"),
        ("__myl_Cast", "cast"),
        ("__myl_CastReshTranMove_myl0_4", "cast"),
        ("__myl_CastMul", "other"),
        ("__myl_MoveReplConc", "other"),
        ("__myl_MulMinMaxRounCast", "other"),
        ("maxpool", "other"),
    ],
)
def test_generated_names(name, kind):
    assert kind_from_generated_name(name) == kind


def test_layer_names_with_brackets():
    text = "[ONNX Layer: a[0]/MatMul]\x1f[ONNX Layer: b]\x1e[ONNX Layer: b]"
    assert layers_from_metadata(text) == ("a[0]/MatMul", "b")


SHAPES = {
    "x": ('"n" 49', "half"),
    "m": ('"rows" 32', "int8"),
    "w": ("32 64", "int8"),
    "y": ('"rows" 64', "half"),
    "s": ("", "float"),
}
SHAPES |= {"n": ("1", "int64"), "odd": ('"n" "n"', "half"), "lost": ('"nowhere" 4', "half"), "c": ("64 8 3 3", "half")}
SHAPES |= {
    "f": ('"n" 8 4 4', "half"),
    "g": ('"n" 64 2 2', "half"),
    "q": ('"rows" 3 32', "half"),
    "k": ('"rows" 32 5', "half"),
}
SHAPES |= {"v": ('"rows" 5 16', "half"), "o": ('"rows" 3 16', "half")}
SHAPES |= {"z": ('"rows" 3 5', "half"), "v5": ('"rows" 5', "half")}
SHAPE_MAIN = """shape_main {
 label bb1:
  copy={ name="c" output={"n" } input={"x_shapeInput.1" }  stream=0 }
  memset={ name="s" output={"__s^7i64" }  src="7i64" stream=0 }
  mul={ name="p" output={"rows" } input={"n" "__s^7i64" } stream=0 }
}
"""


def sized(operation, inputs, output):
    """A kernel of a program whose tensors have the shapes of SHAPES."""
    described = [
        f'  tensor={{ alignment=2 dims={{ {dims} }} name="{name}" strides={{ 1 }} type={dtype} }}'
        for name, (dims, dtype) in SHAPES.items()
    ]
    text = (
        'header {\n  version = 5\n  outputs={ "y" }\n  shape_inputs={ "x_shapeInput.1" }\n}\n'
        "descriptors {\n" + "\n".join(described) + "\n}\n"
        "main {\n" + op(operation, "_gemm_mha_v2", inputs, (output,)) + "\n}\n" + SHAPE_MAIN
    )
    [kernel] = kernels_from_rtx_plan(plan(text.encode()))
    return kernel


def test_sizes_follow_the_number_of_images():
    kernel = sized("fully_connected", ("m", "w", "s", "n"), "y")
    assert [(each.name, each.dims, each.grows) for each in kernel.reads] == [
        ("m", (7, 32), True),
        ("w", (32, 64), False),
        ("s", (), False),
    ]
    assert [each.bytes(3) for each in (*kernel.reads, *kernel.writes)] == [3 * 7 * 32, 32 * 64, 4, 3 * 7 * 64 * 2]


@pytest.mark.parametrize("name", ["odd", "lost"])
def test_a_shape_that_cannot_be_computed_is_unknown(name):
    [tensor] = sized("function", (name,), "y").reads
    assert (tensor.dims, tensor.bytes(8)) == (None, 0)


@pytest.mark.parametrize(
    ("operation", "inputs", "output", "macs"),
    [
        ("fully_connected", ("m", "w", "s"), "y", 7 * 32 * 64),
        ("fully_connected", ("q", "k", "s"), "z", 7 * 3 * 5 * 32),
        ("fully_connected", ("m", "w", "s"), "v5", None),  # w has no 5 columns
        ("corrltn", ("f", "c", "s"), "g", 64 * 2 * 2 * 8 * 3 * 3),
        ("deconvolution", ("g", "c", "s"), "f", 64 * 2 * 2 * 8 * 3 * 3),
        ("function", ("q", "k", "s", "v"), "o", 7 * (3 * 5 * 32 + 3 * 5 * 16)),
        ("function", ("q", "k", "lost"), "o", None),
        ("fully_connected", ("m", "lost"), "y", None),
    ],
)
def test_multiply_adds(operation, inputs, output, macs):
    assert sized(operation, inputs, output).macs == macs
