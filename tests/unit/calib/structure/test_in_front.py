"""A scale in front of a layer: the layer reads it, copies keep it, and what replaces the layer stands behind it."""

import copy

import pytest
import torch
from torch import nn

from calib.images.batches import Half
from calib.judge.choice import output_terms
from calib.methods import rtn
from calib.network.qdq import QuantLinear, SimulatedLayer, quantized_net, rounding_module
from calib.network.unit_io import readers_and_sizes
from calib.quant_model import QuantModel
from calib.quantizer import channel_qparams, qparams_from_amax
from calib.scales.calibrate import Config as CalibrateConfig
from calib.scales.calibrate import calibrate
from calib.scales.equalise import Config, apply_moves, equalise
from calib.structure.in_front import alone, in_front, put_in_front, replace_layer
from calib.structure.moves import FRONT, ChannelAffine, Moved
from calib.structure.structure import structure_of
from tests.tiny import half_of

SCALE, SHIFT = torch.tensor([0.5, 2.0, 4.0, 1.0]), torch.tensor([1.0, 0.0, -3.0, 0.5])


class PostNorm(nn.Module):
    """Two blocks with the norm behind the residual sum, as in BERT: query and key read what the sum reads as well."""

    def __init__(self, width=16):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.query, self.key = (nn.ModuleList(nn.Linear(width, width) for _ in range(2)) for _ in range(2))
        self.last = nn.Linear(width, 5)

    def forward(self, x):
        x = self.norms[0](x)
        for norm, query, key in zip(self.norms[1:], self.query, self.key, strict=True):
            x = norm(x + torch.tanh(query(x)) * torch.sigmoid(key(x)))
        return self.last(x.mean(1))


def post_norm():
    """(such a network with channels that differ a hundredfold, two halves of inputs, others)."""
    torch.manual_seed(0)
    net = PostNorm().eval().requires_grad_(False)
    for norm in net.norms[:2]:
        norm.weight.copy_(torch.logspace(-1, 1, 16))
    halves: list[Half] = [half_of([torch.randn(8, 6, 16) for _ in range(2)]) for _ in range(2)]
    return QuantModel.of("post norm", net, structure_of(net, torch.randn(1, 6, 16))), halves, torch.randn(64, 6, 16)


def scaled(layer):
    put_in_front(layer, ChannelAffine(nn.Identity(), SCALE, SHIFT))
    return layer


def test_a_layer_and_its_copies_read_what_stands_in_front():
    layer, x = nn.Linear(4, 3), torch.randn(5, 4)
    expected = nn.functional.linear((x - SHIFT) / SCALE, layer.weight, layer.bias)
    plain = layer(x)
    assert in_front(layer) is None
    for each in (scaled(layer), copy.deepcopy(layer)):
        torch.testing.assert_close(each(x), expected)
        torch.testing.assert_close(alone(each)(x), plain)
        assert in_front(each) is not None
    assert in_front(alone(layer)) is None


def test_what_is_put_in_front_twice_is_run_once():
    layer, x = scaled(scaled(nn.Linear(4, 3))), torch.randn(5, 4)
    torch.testing.assert_close(layer(x), nn.functional.linear((x - SHIFT) / SCALE, layer.weight, layer.bias))


@pytest.mark.parametrize("kind", [QuantLinear, SimulatedLayer])
def test_what_replaces_a_layer_rounds_what_stands_in_front_of_it(kind):
    layer, x = scaled(nn.Linear(4, 3)), torch.randn(5, 4)
    grid, weight = qparams_from_amax(torch.tensor(8.0)), channel_qparams(layer.weight)
    net = nn.Sequential(layer)
    expected = nn.functional.linear(
        grid.fake_quantize((x - SHIFT) / SCALE), weight.fake_quantize(layer.weight), layer.bias
    )
    quantizer = nn.Module()
    quantizer.forward = grid.fake_quantize
    new = (
        QuantLinear(layer, grid, weight)
        if kind is QuantLinear
        else SimulatedLayer(layer, quantizer, rounding_module("weight", weight))
    )
    replace_layer(net, "0", new)
    torch.testing.assert_close(net(x), expected)


def test_a_layer_that_brings_its_own_keeps_it():
    net, other = nn.Sequential(scaled(nn.Linear(4, 3))), nn.Linear(4, 3)
    put_in_front(other, nn.ReLU())
    replace_layer(net, "0", other)
    x = torch.randn(5, 4)
    torch.testing.assert_close(net(x), nn.functional.linear(x.relu(), other.weight, other.bias))


def test_in_front_of_the_readers_of_a_residual_stream_scales_can_move():
    model, _, x = post_norm()
    fronts = [place for place in model.structure.places if place.kind == FRONT]
    assert [place.readers for place in fronts] == [(f"query.{i}", f"key.{i}") for i in range(2)]
    moved = apply_moves(
        model, [Moved(p.producer, p.readers, torch.rand(len(p.rows)) + 0.5, torch.randn(len(p.rows))) for p in fronts]
    )
    torch.testing.assert_close(moved.net(x), model.net(x), rtol=1e-4, atol=1e-4)
    twice = apply_moves(
        moved, [Moved(p.producer, p.readers, torch.rand(len(p.rows)) + 0.5, torch.randn(len(p.rows))) for p in fronts]
    )
    torch.testing.assert_close(twice.net(x), model.net(x), rtol=1e-4, atol=1e-4)


def test_layers_behind_such_norms_lose_less_when_their_inputs_are_scaled():
    model, halves, x = post_norm()

    def error(exponents):
        done = calibrate(equalise(model, halves, Config(exponents=exponents)), halves, CalibrateConfig())
        done = rtn.bias_corrected(rtn.nearest(done).whole, halves).whole
        return float((quantized_net(done)(x) - model.net(x)).square().sum())

    assert error((0.0, 0.5, 0.9)) < 0.7 * error((0.0,))


def test_a_layer_that_is_replaced_by_itself_changes_nothing():
    model, halves, x = post_norm()
    done = rtn.nearest(calibrate(equalise(model, halves, Config()), halves, CalibrateConfig())).whole
    net, other, layers = quantized_net(done), quantized_net(done), [*done.layers]
    assert all(in_front(net.get_submodule(name)) is not None for name in layers if "query" in name or "key" in name)

    def same(name, read, returned):
        return other.get_submodule(name)(read) - returned

    terms = output_terms(net, done.float_net, layers, x[:4], same, torch.Generator().manual_seed(0))
    assert float(terms[:, 0].abs().max()) > 0
    assert float(terms[:, 1:].abs().max()) < 1e-6 * float(terms[:, 0].abs().max())


def test_readers_of_one_tensor_are_a_group_behind_what_stands_in_front_of_each():
    model, halves, x = post_norm()
    moved = equalise(model, halves, Config(exponents=(0.7,)))
    for each in (model, moved):
        groups, _ = readers_and_sizes(each.net, ["query.0", "key.0"], lambda net=each.net: net(x))
        assert groups == [["query.0", "key.0"]]
    put_in_front(model.net.query[0], nn.Identity())
    groups, _ = readers_and_sizes(model.net, ["query.0", "key.0"], lambda: model.net(x))
    assert groups == [["query.0"], ["key.0"]]
