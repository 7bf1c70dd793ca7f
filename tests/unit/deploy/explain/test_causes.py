"""Defects seeded into small graphs are found in the engines that TensorRT-RTX builds; sound graphs raise no alarm."""

from functools import cache

import pytest

from deploy.engine.kernels import Kernel, KernelTensor
from deploy.explain.causes import CAUSES, causes
from deploy.explain.compared import Compared
from deploy.explain.gpus import GPUS
from tests.docs.pages import ROOT
from tests.unit.deploy.explain.graphs import attention, kernels_of, mlp, residual

PAGE = ROOT / "docs/why-is-int8-not-faster.md"
OF_SIZE = {"Products are too small", "Launch bound", "Batch is too small"}  # that any small graph has
MAKERS = {"mlp": mlp, "attention": attention, "residual": residual}


@cache
def kernels(maker, *arguments, **settings):
    return kernels_of(MAKERS[maker](*arguments, **settings))


def found(int8, fp16, gpu="A10", batch=8):
    return causes(Compared(int8, fp16, GPUS[gpu], batch))


def of_structure(int8, fp16):
    return {name: lines for name, lines in found(int8, fp16).items() if name not in OF_SIZE}


def test_sound_graphs_raise_no_alarm():
    assert of_structure(kernels("mlp", True), kernels("mlp", False)) == {}
    assert of_structure(kernels("attention"), kernels("attention", False, False)) == {}
    for fp16 in (kernels("mlp", False, "Gelu", True), kernels("residual", False), kernels("attention", False, False)):
        assert of_structure(fp16, fp16) == {}


def test_an_fp32_island_is_named():
    alarms = of_structure(kernels("mlp", True, island=True), kernels("mlp", False))
    [line] = alarms["FP32 island"]
    assert "fc2/MatMul" in line
    assert line.startswith("4 kernels in FP32: ")
    [line] = alarms["Cast and reformat kernels"]
    assert line.startswith("2 kernels for types and layouts alone, 0 in FP16")
    assert "fc2/Cast_1" in line


def norm(name, out, residuals=0):
    """A kernel inside LayerNorm, which computes in FP32 and writes `out`; `residuals`: FP16 tensors it reads beside."""
    x, y = KernelTensor("x", "fp32", (64, 96), True), KernelTensor("y", out, (64, 96), True)
    beside = (KernelTensor("r", "fp16", (64, 96), True),) * residuals
    return Kernel(name, "other", (), (out,), ("norm/LayerNormalization", f"fc/{name}"), (x, *beside), (y,))


def test_fp32_inside_a_norm_that_fp16_has_too_is_no_island():
    for out in ("int8", "fp16"):
        assert "FP32 island" not in found((norm("q", out),), (norm("k", "fp16", residuals=2),))
    assert "FP32 island" in found((norm("q", "int8"),), pointwise(64 * 96))
    assert "FP32 island" not in found((norm("q", "int8"), *pointwise(64 * 96 * 1000)), None)  # hardly any bytes


def test_a_cast_behind_dequantize_is_named():
    [line] = of_structure(kernels("mlp", True, cast=True), kernels("mlp", False))["INT8 operands multiplied in float"]
    assert line == "1 product with INT8 operands multiplied in float: __myl_CastMulFc [fc2/MatMul]"


@pytest.mark.parametrize("twin", [True, False])
def test_a_half_quantized_attention_is_named(twin):
    fp16 = kernels("attention", False, False) if twin else None
    lines = of_structure(kernels("attention", True, False), fp16)["Attention is not fused"]
    assert lines[0] == "1 attention of several kernels: attn/Softmax"
    assert lines[1] == "half INT8, one product INT8 and the other FP16: attn/Softmax"


def test_an_int8_attention_whose_output_is_not_rounded_is_not_fused_and_not_half_int8():
    lines = of_structure(kernels("attention", output=False), None)["Attention is not fused"]
    assert lines == ("1 attention of several kernels: attn/Softmax",)


def test_an_attention_that_fp16_does_not_fuse_either_is_no_cause():
    unfused = kernels("attention", True, False)
    assert "Attention is not fused" not in of_structure(unfused, unfused)


def test_an_activation_outside_its_product_is_named():
    alarms = of_structure(kernels("mlp", True, "Gelu", True), kernels("mlp", False, "Gelu", True))
    assert "act/Gelu" in alarms["Activation is not fused"][0]
    total, between = alarms["It moves more bytes than FP16"]
    assert "FP16" in total
    assert "fc1/Add" in between


def test_an_activation_that_two_kernels_cover_is_part_of_its_product():
    product = Kernel("k", "gemm", ("int8", "int8"), ("fp16",), ("fc/MatMul", "act/Relu"))
    other = Kernel("o", "other", (), (), ("act/Relu", "fc2/QuantizeLinear"))
    assert "Activation is not fused" not in found((product, other), (product,))
    assert "Activation is not fused" in found((other,), (product,))


def tensor(name, dtype, grows=True):
    return KernelTensor(name, dtype, (1, 32, 16, 16), grows)


def convolution(other, fused=False):
    """A convolution and the sum behind it, as TensorRT lists them; `other`: the type of the sum's other operand."""
    reads = (tensor("x", "int8"), KernelTensor("w", "int8", (32, 32, 3, 3)))
    conv, add = ("conv2/Conv",), ("block/Add", "act/Relu")
    if fused:
        return (
            Kernel(
                "k",
                "conv",
                ("int8", "int8"),
                ("int8",),
                conv + add,
                (*reads, tensor("s", other)),
                (tensor("y", "int8"),),
            ),
        )
    return (
        Kernel("c", "conv", ("int8", "int8"), ("fp16",), conv, reads, (tensor("h", "fp16"),)),
        Kernel("a", "other", (), (), add, (tensor("h", "fp16"), tensor("s", other)), (tensor("y", "int8"),)),
    )


def test_a_shortcut_without_a_quantizer_is_named():
    fp16 = kernels("residual", False)
    [line] = found(convolution("fp16"), None)["Shortcut without a quantizer"]
    assert line == "1 sum of a convolution and a shortcut without INT8: a [block/Add]"
    assert "Shortcut without a quantizer" in found(convolution("fp16"), fp16)
    for sound in (convolution("int8", fused=True), convolution("int8"), kernels("residual", True)):
        assert "Shortcut without a quantizer" not in found(sound, fp16)


def pointwise(elements, count=1, dtype="fp16"):
    x, y = KernelTensor("x", dtype, (elements,), True), KernelTensor("y", dtype, (elements,), True)
    return tuple(Kernel(f"p{index}", "other", (), (), (), (x,), (y,)) for index in range(count))


def test_what_depends_on_size_is_told_by_size():
    large, small = pointwise(10**7), pointwise(10, 3)
    assert "Launch bound" not in found(large, None, batch=1)
    [line] = found(small, large, batch=1)["Launch bound"]
    assert line == "3 of 3 kernels are shorter than the 2 us that a launch is assumed to take; FP16 has 1 kernels"

    mixed, twin = pointwise(10, 20) + pointwise(10**6), pointwise(2 * 10**6)
    [line] = found(mixed, twin, batch=1)["Batch is too small"]
    assert "for batch 8" in line
    assert "Batch is too small" not in found(mixed, twin, batch=128)


def test_products_that_arithmetic_limits_are_large_enough():
    x, w, y = (
        KernelTensor("x", "int8", (4096, 4096), True),
        KernelTensor("w", "int8", (4096, 4096)),
        KernelTensor("y", "int8", (4096, 4096), True),
    )
    one = Kernel("k", "gemm", ("int8", "int8"), ("int8",), ("fc/MatMul",), (x, w), (y,), 4096**3)
    assert "Products are too small" not in found((one,), None)
    assert "Products are too small" in found(kernels("mlp", True), None)


@pytest.mark.parametrize(("gpu", "better"), [("T4", False), ("A100", False), ("L4", True), ("H100", True)])
def test_a_gpu_with_fp8_is_named(gpu, better):
    assert ("FP8 is the better choice" in found(pointwise(10), None, gpu)) == better


def test_without_a_twin_nothing_is_compared():
    alarms = found(kernels("mlp", True, "Gelu", True), None)
    assert not {"It moves more bytes than FP16", "Activation is not fused", "Batch is too small"} & {*alarms}


def test_every_cause_has_a_section_with_an_example():
    sections = {text.split("\n")[0]: text for text in PAGE.read_text().split("\n## ")[1:]}
    assert [*sections] == [*CAUSES]
    assert [name for name, text in sections.items() if "```text" not in text] == []


def test_examples_of_small_graphs_are_what_is_printed():
    page = " ".join(PAGE.read_text().split())
    for graph, fp16 in (
        (kernels("mlp", True, island=True), kernels("mlp", False)),
        (kernels("mlp", True, cast=True), kernels("mlp", False)),
        (kernels("attention", True, False), kernels("attention", False, False)),
    ):
        alarms = of_structure(graph, fp16)
        seeded = {"FP32 island", "INT8 operands multiplied in float", "Attention is not fused"} & {*alarms}
        assert [line for name in seeded for line in alarms[name] if line not in page] == []
        assert seeded
