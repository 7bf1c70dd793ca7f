"""Products written in INT8 through export, parity and engine: no kernel more, and one byte per value."""

import functools

import pytest
import torch

from calib.layerwise.int8_products import linear_layers, products
from calib.network.qdq import quantized_net
from deploy.bridge.export import export_pair
from deploy.bridge.parity import compare_with_onnx
from deploy.engine.audit import audit, planned_layers, require_int8
from deploy.graph.check import check_strongly_typed
from tests.tiny import SIZE, calibrated, rounded, tiny_batches, tiny_halves

LAYERS = ("blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.mlp.fc2")


@functools.cache
def quantized(layers: tuple[str, ...]):
    halves = tiny_halves(2)
    plain = rounded(calibrated("vit", halves), halves)
    return products(plain, linear_layers(plain), halves).candidate([layers, layers], layers).whole


@functools.cache
def exported(layers: tuple[str, ...]):
    net = quantized_net(quantized(layers))
    return net, *export_pair(net, (SIZE, SIZE))


def test_parity_covers_the_integers_of_products():
    net, _, fp32 = exported(LAYERS)
    images = tiny_batches(1)[0].numpy()
    found = compare_with_onnx(net, fp32, images)
    assert found.failure() is None
    wrong = quantized_net(quantized(LAYERS))
    wrong.blocks[0].mlp.fc1.output.scale.mul_(2)
    assert compare_with_onnx(wrong, fp32, images).suspect == "blocks.0.mlp.fc1.output"


def test_the_graph_is_strongly_typed_and_plans_the_same_layers():
    assert check_strongly_typed(exported(LAYERS)[1]) == ()
    assert planned_layers(exported(LAYERS)[1]) == planned_layers(exported(())[1])


@functools.cache
def built(layers: tuple[str, ...]):
    pytest.importorskip("tensorrt_rtx")
    from deploy.engine.backends import tensorrt_rtx
    from deploy.engine.build import Profile

    return tensorrt_rtx.build(exported(layers)[1], Profile(2, 4), (89,)).kernels


def test_the_engine_writes_these_products_in_int8_with_no_more_kernels():
    found, plain = built(LAYERS), built(())
    require_int8(audit(found, planned_layers(exported(LAYERS)[1])))
    assert len(found) <= len(plain)

    def written(kernels):
        gemms = [kernel for kernel in kernels if kernel.kind == "gemm" and kernel.outputs == ("int8",)]
        return {layer for kernel in gemms for layer in LAYERS if f"{layer}/MatMul" in kernel.layers}

    assert written(found) == {*LAYERS}
    assert written(plain) == set()


def test_what_rounds_is_near_the_float_network():
    images = tiny_batches(1, seed=4)[0]
    with torch.no_grad():
        exact, found = quantized(LAYERS).float_net(images), exported(LAYERS)[0](images)
    assert 0 < float((found - exact).norm() / exact.norm()) < 0.2
