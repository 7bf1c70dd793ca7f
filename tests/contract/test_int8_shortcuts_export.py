"""Shortcuts in INT8 through export and parity: one QuantizeLinear, whose integers the sum and the next layer read."""

import functools

import pytest

from calib.layerwise.int8_shortcuts import shortcuts
from calib.network.qdq import quantized_net
from deploy.bridge.export import export_pair
from deploy.bridge.parity import compare_with_onnx
from deploy.engine.audit import audit, planned_layers, require_int8
from deploy.graph.check import check_strongly_typed
from tests.tiny import SIZE, calibrated, rounded, tiny_batches, tiny_halves

pytestmark = pytest.mark.slow


@functools.cache
def exported(family: str):
    halves = tiny_halves(2)
    plain = rounded(calibrated(family, halves), halves)
    names = list(plain.structure.shortcuts)
    model = shortcuts(plain, halves).candidate([names, names], names).whole
    net = quantized_net(model)
    return model, net, *export_pair(net, (SIZE, SIZE))


@pytest.mark.parametrize("family", ["resnet", "mobilenet", "regnet"])
def test_simulation_and_graph_round_alike(family):
    model, net, fp16, fp32 = exported(family)
    images = tiny_batches(1)[0].numpy()
    assert compare_with_onnx(net, fp32, images).failure() is None
    assert check_strongly_typed(fp16) == ()
    wrong = quantized_net(model)
    name = model.int8_shortcuts[-1]
    wrong.get_submodule(f"{name}.shortcut_quantizer").scale.mul_(2)
    assert compare_with_onnx(wrong, fp32, images).suspect == f"{name}.shortcut_quantizer"


@pytest.mark.parametrize("family", ["mobilenet", "regnet"])
def test_the_sum_and_the_next_layer_read_the_same_integers(family):
    model, _, fp16, _ = exported(family)
    producers = {output: node for node in fp16.graph.node for output in node.output}
    nodes = {node.name: node for node in fp16.graph.node}
    for name, readers in model.structure.shortcuts.items():
        own = nodes[f"{name}.shortcut_quantizer/QuantizeLinear"]
        for reader in readers:
            dequantize = producers[nodes[f"{reader}/Conv"].input[0]]
            assert dequantize.op_type == "DequantizeLinear"
            assert dequantize.input[0] == own.output[0]
            assert f"{reader}/QuantizeLinear" not in nodes
        sums = [
            node
            for node in fp16.graph.node
            if node.op_type == "Add" and any(producers.get(each) is not None and producers[each].op_type ==
               "DequantizeLinear" and producers[each].input[0] == own.output[0] for each in node.input)
        ]  # fmt: skip
        assert len(sums) == 1, name


def test_the_engine_still_plans_every_layer():
    pytest.importorskip("tensorrt_rtx")
    from deploy.engine.backends import tensorrt_rtx
    from deploy.engine.build import Profile

    _, _, fp16, _ = exported("resnet")
    require_int8(audit(tensorrt_rtx.build(fp16, Profile(2, 4), (89,)).kernels, planned_layers(fp16)))
