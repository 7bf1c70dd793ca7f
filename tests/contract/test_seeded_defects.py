"""A wrong scale, axis, sign or weight anywhere in the graph is found, and the layer it lies in is named; no false alarms."""

import random

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from calib.network.qdq import quantized_net
from deploy.bridge.export import export_pair
from deploy.bridge.parity import compare_with_onnx
from tests.tiny import SIZE, calibrated, rounded, tiny_halves


@pytest.fixture(scope="module", params=["vit", "resnet"])
def exported(request):
    halves = tiny_halves()
    model = rounded(calibrated(request.param, halves), halves)
    net = quantized_net(model)
    return net, export_pair(net, (SIZE, SIZE))[1], model.quantized_layers


def images(seed):
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)).numpy()


DEFECTS = {
    "input scale": ("input_scale", lambda array, draw: array * np.float32(draw.choice([0.5, 0.9, 1.1, 2.0]))),
    "weight scales": ("weight_scale", lambda array, draw: array * np.float32(draw.choice([0.5, 0.8, 1.25, 2.0]))),
    "axis of the weight scales": ("weight_scale", lambda array, draw: np.roll(array, draw.randint(1, len(array) - 1))),
    "sign of the bias": ("bias", lambda array, _draw: -array),
    "integers of another channel": ("integers", lambda array, draw: np.roll(array, draw.randint(1, 7), axis=-1)),
}


def spoilt(model, layer, kind, draw):
    """A copy of `model` with one tensor of `layer` made wrong; None where that changes hardly anything."""
    ending, change = DEFECTS[kind]
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for tensor in model.graph.initializer:
        if tensor.name == f"{layer}.{ending}":
            before = numpy_helper.to_array(tensor)
            after = change(before, draw).astype(before.dtype)
            if np.abs(after.astype(float) - before).max() <= 0.05 * np.abs(before.astype(float)).max():
                return None
            tensor.CopyFrom(numpy_helper.from_array(after, tensor.name))
            return model
    return None


@pytest.mark.parametrize("seed", range(20))
def test_the_layer_of_a_defect_is_named(exported, seed):
    net, graph, layers = exported
    draw = random.Random(seed)
    while (wrong := spoilt(graph, layer := draw.choice(layers), kind := draw.choice([*DEFECTS]), draw)) is None:
        pass
    found = compare_with_onnx(net, wrong, images(seed))
    said = found.failure()
    assert said, (layer, kind)
    assert found.wrong == layer, (kind, said)
    assert layer in said


def test_a_defect_between_the_layers_is_told_as_such(exported):
    net, graph, _ = exported
    wrong = onnx.ModelProto.FromString(graph.SerializeToString())
    (tensor,) = [each for each in wrong.graph.initializer if each.name in ("blocks.1.norm1.bias", "conv1.0.bias")]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(0.5), tensor.name))
    found = compare_with_onnx(net, wrong, images(0))
    assert found.wrong == ""
    assert "every quantized layer computes the same from the same integers" in found.failure()
    assert found.suspect in ("blocks.1.attn.qkv", "conv1.3")


@pytest.mark.parametrize("seed", range(20))
def test_a_sound_graph_raises_no_alarm(exported, seed):
    net, graph, _ = exported
    assert compare_with_onnx(net, graph, images(seed)).failure() is None
