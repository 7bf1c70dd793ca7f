"""INT8 attention through export, parity and engine."""

import functools

import pytest
import torch

from calib.attention.int8 import Attentions, with_attention
from calib.network.qdq import quantized_net
from deploy.bridge.export import export_pair
from deploy.bridge.parity import compare_with_onnx
from deploy.engine.audit import audit, planned_attention, planned_layers, require_int8
from deploy.engine.backends import onnxruntime
from deploy.engine.build import Profile
from deploy.errors import ContractError
from deploy.graph.check import check_strongly_typed
from deploy.graph.integer_kernels import integer_kernels
from deploy.measure.accuracy import sqnr_db
from deploy.measure.integer_graph import integer_layers
from deploy.measure.onnx_runner import OnnxRunner
from deploy.measure.ort_options import saturates
from tests.tiny import SIZE, calibrated, rounded, tiny_batches, tiny_halves


@functools.cache
def quantized(blocks: int = 2):
    halves = tiny_halves(2)
    plain = rounded(calibrated("vit", halves), halves)
    fits = Attentions(plain, halves).together.whole
    return with_attention(plain, {name: fits[name] for name in list(fits)[:blocks]})


@functools.cache
def exported(blocks: int):
    net = quantized_net(quantized(blocks))
    return net, *export_pair(net, (SIZE, SIZE))


def test_parity_covers_the_four_roles():
    net, _, fp32 = exported(2)
    images = tiny_batches(1)[0].numpy()
    found = compare_with_onnx(net, fp32, images)
    assert found.failure() is None
    wrong = quantized_net(quantized())
    wrong.blocks[1].attn.softmax.scale.mul_(2)
    assert compare_with_onnx(wrong, fp32, images).suspect == "blocks.1.attn.softmax"


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_the_graph_plans_two_products_for_each_attention(blocks):
    _, fp16, _ = exported(blocks)
    assert check_strongly_typed(fp16) == ()
    expected = tuple(f"blocks.{i}.attn/MatMul{suffix}" for i in range(blocks) for suffix in ("", "_1"))
    assert planned_attention(fp16) == expected
    assert len(planned_layers(fp16)) == 8


def test_integer_kernels_go_beside_an_int8_attention():
    _, _, fp32 = exported(2)
    rewritten, written = integer_kernels(fp32)
    images = tiny_batches(1)[0].numpy()
    exact = OnnxRunner(fp32.SerializeToString(), fused=False)(images)
    assert written == {"MatMulIntegerToFloat": 8}
    assert sqnr_db(exact, OnnxRunner(rewritten.SerializeToString())(images)) > 40


@pytest.mark.skipif(saturates(), reason="no integer kernels on this processor")
@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_an_engine_of_onnx_runtime_says_that_its_int8_attention_is_not_fused(blocks):
    graph = exported(blocks)[2]
    found = onnxruntime.build(graph, Profile(2, 4), None)
    assert [each.partition(":")[0] for each in found.notes] == ["ONNX Runtime has no fused INT8 attention"] * bool(
        blocks
    )
    told = audit(found.kernels, planned_layers(graph), planned_attention(graph))
    assert (told.lost, told.fused_attention) == ((), 2 - blocks)
    assert integer_layers(found.plan) == 8  # without the products of attention


@functools.cache
def built(blocks: int):
    pytest.importorskip("tensorrt_rtx")
    from deploy.engine.backends import tensorrt_rtx

    return tensorrt_rtx.build(exported(blocks)[1], Profile(2, 4), None).kernels


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_engine_fuses_it_and_has_fewer_kernels(blocks):
    _, fp16, _ = exported(blocks)
    found = audit(built(blocks), planned_layers(fp16), planned_attention(fp16))
    require_int8(found)
    assert (found.fused_attention, found.int8_attention) == (2, blocks)
    assert found.kernels <= len(built(0))


def test_an_attention_that_stayed_fp16_fails_by_name():
    _, fp16, _ = exported(2)
    found = audit(built(1), planned_layers(fp16), planned_attention(fp16))
    assert found.lost_attention == ("blocks.1.attn/MatMul", "blocks.1.attn/MatMul_1")
    with pytest.raises(ContractError, match=r"blocks\.1\.attn/MatMul"):
        require_int8(found)


def test_float_and_rounded_outputs_stay_close():
    net, *_ = exported(2)
    images = tiny_batches(1, seed=4)[0]
    with torch.no_grad():
        exact, found = quantized().float_net(images), net(images)
    assert float((found - exact).norm() / exact.norm()) < 0.2
