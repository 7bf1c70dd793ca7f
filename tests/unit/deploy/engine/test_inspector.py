"""Fixtures: hand-made documents in the shape of TensorRT 10 and 11; see deploy/engine/inspector.py."""

import json
from pathlib import Path

import pytest

from calib.errors import UserError
from deploy.engine.inspector import kernels_from_inspector

FIXTURES = Path(__file__).parent / "fixtures"


def read(version):
    return kernels_from_inspector((FIXTURES / f"inspector_{version}.json").read_text())


def kinds(kernels):
    return {kernel.name.split("_myl0")[0]: (kernel.kind, kernel.precision) for kernel in kernels}


def one(**layer):
    [kernel] = kernels_from_inspector(json.dumps([{"Name": "k", "LayerType": "gemm", **layer}]))
    return kernel


def test_tensorrt_10():
    assert kinds(read(10)) == {
        "Reformatting CopyNode for Input Tensor 0 to stem": ("cast", "unknown"),
        "stem/QuantizeLinear": ("other", "unknown"),
        "stem.weight + stem/Conv + PWN(act/Relu)": ("conv", "int8"),
        "dw.weight + dw/Conv": ("conv", "int8"),  # no tactic name: the tensors tell
        "pw.weight + pw/Conv": ("conv", "fp32"),  # INT8 tensors, but the tactic multiplies in TF32
        "__myl_FcMulAdd": ("gemm", "int8"),
        "_gemm_mha_v2": ("attention", "fp16"),
        "mha.proj/MatMul": ("gemm", "int8"),
        "__myl_CastMulFc": ("gemm", "unknown"),  # INT8 tensors prove nothing about a generated kernel
        "head/Gemm": ("gemm", "fp16"),
        "__myl_AddCastMean": ("other", "unknown"),
    }


def test_tensorrt_11():
    assert kinds(read(11)) == {
        "__myl_Cast": ("cast", "unknown"),
        "fc1/MatMul": ("gemm", "int8"),
        "fc2/MatMul": ("gemm", "fp16"),
        "fc3/MatMul": ("gemm", "int8"),
        "fc4/MatMul": ("gemm", "fp32"),
        "_gemm_mha_v2": ("attention", "int8"),
    }


def test_layers_of_a_fused_kernel():
    fused = {kernel.name: kernel.layers for kernel in read(10)}
    assert fused["__myl_FcMulAdd_myl0_1"] == ("q/MatMul", "k/MatMul", "v/MatMul")
    assert fused["stem.weight + stem/Conv + PWN(act/Relu)"] == ("stem/Conv", "act/Relu")
    assert fused["Reformatting CopyNode for Input Tensor 0 to stem"] == ()


def test_types_of_tensors():
    by_name = {kernel.name: kernel for kernel in read(10)}
    assert by_name["dw.weight + dw/Conv"].inputs == ("int8", "int8")
    assert by_name["_gemm_mha_v2_myl0_2"].outputs == ("int8",)
    assert one(Inputs=[{"Name": "x", "Format/Datatype": "N/A"}]).inputs == ("unknown",)


def test_a_residual_is_no_weight():
    tensors = [{"Name": name, "Datatype": "Int8"} for name in ("x", "skip")]
    assert one(LayerType="CaskConvolution", Inputs=tensors).precision == "unknown"
    half = one(LayerType="CaskConvolution", Inputs=tensors, Weights={"Type": "Half", "Count": 9})
    assert half.precision == "fp16"


def listed(name, dtype, *dims):
    return {"Name": name, "Datatype": dtype, "Dimensions": list(dims)}


def test_the_mask_of_an_attention_is_no_factor():
    heads = [listed("q", "Int8", -1, 4, 49, 32), listed("k", "Int8", -1, 4, 32, 49), listed("v", "Int8", -1, 4, 49, 32)]
    mask, out = listed("mask", "Half", 1, 4, 49, 49), listed("o", "Int8", -1, 4, 49, 32)
    fused = {"Name": "_gemm_mha_v2", "LayerType": "kgen", "Outputs": [out]}
    masked = one(**fused, Inputs=[*heads[:2], mask, heads[2]])
    assert (masked.kind, masked.precision) == ("attention", "int8")
    assert masked.macs == 2 * 4 * 49 * 49 * 32
    assert one(**fused, Inputs=[*heads[:2], heads[2], listed("v", "Half", -1, 4, 49, 32)]).precision == "fp16"


def test_sizes_and_multiply_adds():
    gemm = one(Inputs=[listed("x", "Int8", -1, 5, 64)], Outputs=[listed("y", "Half", -1, 5, 16)],
               Weights={"Type": "Int8", "Count": 1024})  # fmt: skip
    assert [each.bytes(3) for each in (*gemm.reads, *gemm.writes)] == [3 * 5 * 64, 1024, 3 * 5 * 16 * 2]
    assert gemm.macs == 5 * 64 * 16
    conv = one(LayerType="CaskConvolution", Inputs=[listed("x", "Int8", -1, 8, 6, 6), listed("skip", "Int8", -1, 4, 6, 6)],
               Outputs=[listed("y", "Int8", -1, 4, 6, 6)], Weights={"Type": "Int8", "Count": 4 * 8 * 3 * 3})  # fmt: skip
    assert conv.macs == 4 * 6 * 6 * 8 * 3 * 3


@pytest.mark.parametrize("dims", [[-1, -1, 3], ["N", 3], None, "3x4"])
def test_a_shape_that_cannot_be_read_is_unknown(dims):
    tensor = {"Name": "x", "Datatype": "Half", "Dimensions": dims}
    kernel = one(Inputs=[tensor], Outputs=[tensor], Weights={"Type": "Int8", "Count": 64})
    assert (kernel.reads[0].dims, kernel.macs) == (None, None)


@pytest.mark.parametrize(
    ("tactic", "precision"),
    [
        ("sm80_xmma_gemm_i8i8_i8i32_f32_tn_n_tilesize256x128x64", "int8"),
        ("sm80_xmma_gemm_i8f32_i8i32_f32_tn_n_tilesize64x64x64", "int8"),
        ("sm80_xmma_gemm_i8f16_f16f32_f32_tn_n_tilesize64x64x64", "fp16"),  # INT8 by FP16 is no INT8 product
        ("turing_fp16_i8816cudnn_int8_128x128_ldg16_relu_small_nt_v1", "int8"),
        ("volta_int8x4_icudnn_int8x4_128x32_relu_xregs_medium_c32_nn_v1", "int8"),
        ("sm80_xmma_gemm_f16f16_f16f32_f32_nt_n_tilesize256x128x32", "fp16"),
        ("sm50_xmma_cublas_gemvx_f16f16_f32", "fp16"),
        ("ampere_fp16_s16816gemm_fp16_128x64_ldg8_f2f_stages_64x3_tn", "fp16"),
        ("cutlass_80_tensorop_bf16_s16816gemm_bf16_128x64_32x6_tn_align8", "unknown"),
        ("sm80_xmma_gemm_f32f32_tf32f32_f32_nn_n_tilesize64x64x32", "fp32"),
        ("ampere_sgemm_128x32_nn", "fp32"),
        ("sm89_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize64x64x64", "unknown"),
        ("sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64", "unknown"),
    ],
)
def test_tactic_names(tactic, precision):
    assert one(TacticName=tactic).precision == precision


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ('{"Layers": ["stem/Conv", "head/Gemm"], "Bindings": ["x"]}', "profiling_verbosity=DETAILED"),
        ('{"Layers": []}', "profiling_verbosity=DETAILED"),
        ("Layer(gemm): head/Gemm", "JSON"),
        ('{"Bindings": ["x"]}', "'Layers'"),
        ("3", "'Layers'"),
    ],
)
def test_documents_that_prove_nothing(text, advice):
    with pytest.raises(UserError, match=advice):
        kernels_from_inspector(text)
