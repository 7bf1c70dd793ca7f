"""The weights of a network that was exported go with the network, though the exporter's rewriter keeps its last graph."""

import gc
import weakref

import timm
import torch

from deploy.bridge.export import export_float


def test_no_weight_is_left_of_a_network_that_was_exported():
    net = timm.create_model("test_vit").eval()
    weights = [weakref.ref(each) for each in net.parameters()]
    shape = net.blocks[0].mlp.fc1.weight.shape
    before = sum(type(each) is torch.Tensor and each.shape == shape for each in gc.get_objects())
    export_float(net, (160, 160))
    del net
    gc.collect()
    assert not any(weight() is not None for weight in weights)
    assert sum(type(each) is torch.Tensor and each.shape == shape for each in gc.get_objects()) == before
