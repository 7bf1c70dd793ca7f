"""Which layers' fits are offered together, on a network with one layer broken and right and wrong fits for two."""

import dataclasses

import pytest
import torch

from calib.images.batches import ROTATIONS, Half, Part
from calib.judge.held_out import Candidate, challenge
from calib.layerwise.layer_fits import FittedLayers
from calib.layerwise.subsets import layer_candidates, layer_terms
from calib.methods import rtn
from calib.network.rounded_layer import rounded_layers, with_biases
from calib.scales.calibrate import Config, calibrate
from tests.tiny import tiny_halves, tiny_model

GOOD, BAD = "blocks.0.mlp.fc1", "blocks.1.mlp.fc2"
HALVES = tiny_halves(4)


@pytest.fixture(scope="module")
def case():
    """A rounded network whose layer `GOOD` has a wrong bias, the right layers, and a wrong one in place of `BAD`."""
    model = rtn.nearest(calibrate(tiny_model("vit"), HALVES, Config("max"))).whole
    layers = rounded_layers(model)
    right = {name: layers[name] for name in (GOOD, BAD)}
    size = right[BAD].bias.shape[1]
    wrong = dataclasses.replace(right[BAD], bias=right[BAD].bias + torch.linspace(-30, 30, size))
    broken = with_biases(model.net, {GOOD: torch.full((right[GOOD].bias.numel(),), 0.5)})
    return Candidate.unfitted("broken", dataclasses.replace(model, net=broken)), right, {**right, BAD: wrong}


def fitted(*layers):
    """The same layers in both rotations: of half 0, of half 1, of all images."""
    return FittedLayers([[layers[0], layers[1]]] * 2, layers[2])


def bias_of(model, name):
    return model.net.get_submodule(name).bias


def test_layers_that_lower_the_output_error_are_offered_first_then_all(case):
    plain, right, mixed = case
    offered = layer_candidates(plain, fitted(*[mixed] * 3), HALVES)
    assert [each.name for each in offered] == ["1 of 2 fitted layers", "all 2 fitted layers"]
    for model in (*offered[0].trials[0], *offered[0].trials[1], offered[0].whole):
        assert torch.equal(bias_of(model, GOOD), right[GOOD].bias.flatten())
        assert torch.equal(bias_of(model, BAD), bias_of(plain.whole, BAD))
    assert torch.equal(bias_of(offered[1].whole, BAD), mixed[BAD].bias.flatten())
    assert challenge(plain, offered, HALVES)[0] is offered[0]


def test_where_all_lower_it_or_none_does_only_all_are_offered(case):
    plain, right, mixed = case
    for found in ({GOOD: right[GOOD]}, {BAD: mixed[BAD]}):
        (offered,) = layer_candidates(plain, fitted(*[found] * 3), HALVES)
        assert offered.name == "all 1 fitted layers"
        kept, _, _ = challenge(plain, [offered], HALVES)
        assert kept is (offered if GOOD in found else plain)
    assert layer_candidates(plain, fitted({}, {}, {}), HALVES) == []


def test_every_network_gets_the_layers_of_its_half(case):
    plain, right, _ = case
    found = [
        {GOOD: dataclasses.replace(right[GOOD], bias=right[GOOD].bias + 1e-4 * which)} for which in range(3)
    ]  # fmt: skip
    (offered,) = layer_candidates(plain, fitted(*found), HALVES)
    for model, layers in zip((*offered.trials[0], offered.whole), found, strict=True):
        assert torch.equal(bias_of(model, GOOD), layers[GOOD].bias.flatten())


@pytest.mark.parametrize("rotation", [0, 1])
def test_terms_are_of_the_images_of_the_other_half_that_choose(case, rotation):
    """Images that are never to be looked at have no batches."""
    plain, _, mixed = case
    part, nothing = ROTATIONS[rotation][0], Part([])

    def only(half):
        return Half(tuple(one if index == part else nothing for index, one in enumerate(half.parts)))

    expected = layer_terms(plain, fitted(*[mixed] * 3), [GOOD, BAD], rotation, HALVES)
    found = layer_terms(plain, fitted(*[mixed] * 3), [GOOD, BAD], rotation, [only(half) for half in HALVES])
    assert torch.equal(found, expected)
    absent = FittedLayers([[{GOOD: mixed[GOOD]}] * 2] * 2, mixed)
    assert not layer_terms(plain, absent, [GOOD, BAD], rotation, HALVES)[:, 2].any()
