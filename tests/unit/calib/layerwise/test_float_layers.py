"""Which layers go back to FP16. Oracles: all subsets, and the network itself."""

import itertools
import math

import pytest
import torch
from torch import nn

from calib.layerwise.float_layers import Config, candidates, costs_db, in_float, in_order, shares
from calib.network.qdq import QuantLinear, quantized_net
from tests.tiny import calibrated, rounded, tiny_halves


def error(terms, made):
    return float((terms[:, 0] + terms[:, 1:][:, list(made)].sum(1)).square().sum())


@pytest.mark.parametrize("seed", range(10))
def test_the_first_layer_is_the_best_of_those_that_fit(seed):
    generator = torch.Generator().manual_seed(seed)
    terms = torch.randn(64, 6, generator=generator, dtype=torch.float64)
    terms[:, 0] -= 0.7 * terms[:, 1:].sum(1)
    share = [0.5, 0.01, 0.01, 0.02, 0.01]
    found = in_order(terms, share, Config(0.02, 0.01))
    assert 0 not in dict(found), "it does half of the work"
    best = min(range(1, 5), key=lambda index: error(terms, [index]))
    assert (found[0][0] == best) if found else error(terms, [best]) > 0.99 * error(terms, [])
    assert sum(share[index] for index, _ in found) <= 0.02
    for count in range(1, len(found) + 1):
        before, after = (error(terms, [index for index, _ in found[:number]]) for number in (count - 1, count))
        assert 10 * torch.log10(torch.tensor(before / after)) == pytest.approx(found[count - 1][1], abs=1e-3)


def test_the_cost_of_a_layer_is_what_it_alone_would_gain():
    terms = torch.randn(64, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = costs_db(terms)
    for index, cost in enumerate(found):
        ratio = error(terms, []) / error(terms, [index])
        assert cost == pytest.approx(10 * math.log10(ratio))
    assert len(found) == 3


def test_layers_that_gain_too_little_are_none():
    terms = torch.zeros(8, 3, dtype=torch.float64)
    terms[:, 0], terms[:, 1], terms[:, 2] = 1.0, -0.05, 0.3
    assert in_order(terms, [0.01, 0.01], Config(1.0, 0.5)) == []
    assert [index for index, _ in in_order(terms, [0.01, 0.01], Config(1.0, 0.4))] == [0]
    assert in_order(torch.full((4, 2), torch.nan, dtype=torch.float64), [0.0], Config()) == []


def test_the_shares_are_those_of_the_multiplications():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Flatten(), nn.Linear(128, 10))
    work = {"0": 8 * 4 * 4 * 27, "1": 8 * 4 * 4 * 9, "3": 128 * 10}
    assert shares(net, ["0", "1", "3"], torch.zeros(1, 3, 8, 8)) == {
        name: number / sum(work.values()) for name, number in work.items()
    }


def test_all_calls_of_a_layer_are_its_share():
    layer = nn.Conv2d(3, 3, 3, padding=1)
    net = nn.Sequential(layer, nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 3, 1), nn.MaxPool2d(2), layer)
    work = {"0": 27 * 3 * (64 + 16), "1": 27 * 6 * 64, "2": 6 * 3 * 64}
    assert shares(net, [*work], torch.zeros(1, 3, 8, 8)) == {
        name: pytest.approx(each / sum(work.values())) for name, each in work.items()
    }


@pytest.fixture(scope="module")
def model():
    halves = tiny_halves()
    return rounded(calibrated("vit", halves), halves)


def test_layers_in_float_are_those_of_the_exact_network(model):
    names = ("blocks.0.mlp.fc1", "blocks.1.attn.proj")
    found = in_float(model, dict.fromkeys(names, "why"))
    net = quantized_net(found)
    for name in names:
        assert type(net.get_submodule(name)) is nn.Linear
        assert torch.equal(net.get_submodule(name).weight, model.exact_net.get_submodule(name).weight)
        assert found.float_layers[name] == "why"
    assert sum(isinstance(module, QuantLinear) for module in net.modules()) == len(model.quantized_layers) - 2
    assert set(found.quantized_layers) == {*model.quantized_layers} - {*names}
    assert model.kept_float == {}, "the model before is as it was"


def test_a_layer_that_spoils_the_output_is_found(model):
    halves = tiny_halves()
    grid = model.qparams("blocks.1.mlp.fc2:weight")
    spoilt = in_float(model, {})  # a copy
    weight = spoilt.net.get_submodule("blocks.1.mlp.fc2").weight
    weight.data = grid.fake_quantize(weight + 6 * grid.scale[:, None] * torch.randn_like(weight))
    offer = candidates(spoilt, halves, Config(1.0, 1.0))
    assert list(offer.candidates[0].whole.kept_float) == ["blocks.1.mlp.fc2"]
    costs = offer.details["cost_db"]
    assert max(costs, key=costs.get) == "blocks.1.mlp.fc2"
    assert all(
        list(each.kept_float) == ["blocks.1.mlp.fc2"] for models in offer.candidates[0].trials for each in models
    )


def test_the_order_of_two_layers_is_that_of_the_best_pair():
    terms = torch.tensor([[2.0, -1.0, -1.2, 0.1], [2.0, -1.0, -0.6, 0.1]], dtype=torch.float64)
    found = [index for index, _ in in_order(terms, [0.0] * 3, Config(1.0, 0.01))]
    best = min(itertools.combinations(range(3), 2), key=lambda pair: error(terms, pair))
    assert {*found[:2]} == {*best}


def test_no_layer_small_enough_is_said(model):
    offer = candidates(model, tiny_halves(), Config(0.0, 1.0))
    assert offer.candidates == []
    assert offer.notes == ("no layer does less than 0% of the work",)


@pytest.mark.parametrize("options", [(-0.1, 1.0), (1.5, 1.0), (0.1, 0.0), (0.1, float("inf"))])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        Config(*options)
