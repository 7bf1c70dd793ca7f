"""Changes to layers are adopted as the output on other photographs says: all, some, or none."""

import dataclasses

import pytest
import torch

from calib.judge.held_out import adopt_if_better, serving, sqnr_db
from calib.methods import rtn
from calib.network.rounded_layer import rounded_layer, with_biases
from calib.scales.calibrate import Config, calibrate
from tests.tiny import tiny_batches, tiny_model

GOOD, BAD = "blocks.0.mlp.fc1", "blocks.1.mlp.fc2"
FOLDS = [tiny_batches(4, seed=1), tiny_batches(4, seed=2)]


@pytest.fixture(scope="module")
def rounded():
    """A rounded network whose layer `GOOD` has a wrong bias, and right and wrong biases for two layers."""
    model = tiny_model("vit")
    model = rtn.reduce_error(calibrate(model, FOLDS, Config("max")), FOLDS, rtn.Config())
    right = {
        name: rounded_layer(model.net.get_submodule(name), model.qparams(f"{name}:weight")) for name in (GOOD, BAD)
    }
    wrong = {
        name: dataclasses.replace(layer, bias=layer.bias + torch.linspace(-0.5, 0.5, layer.bias.shape[1]))
        for name, layer in right.items()
    }
    broken = with_biases(model.net, {GOOD: torch.full_like(wrong[GOOD].bias.flatten(), 0.5)})
    return dataclasses.replace(model, net=broken), right, wrong


def test_what_helps_is_adopted(rounded):
    plain, right, _ = rounded
    model, before, after, note = adopt_if_better(plain, [right] * 3, FOLDS)
    assert after > before + 3
    assert torch.equal(model.net.get_submodule(GOOD).bias, right[GOOD].bias.flatten())
    assert note.startswith(f"network output {after:.2f} dB against {before:.2f} dB")


def test_of_changes_that_harm_together_those_that_help_alone_are_adopted(rounded):
    plain, right, wrong = rounded
    mixed = {
        GOOD: right[GOOD],
        BAD: dataclasses.replace(wrong[BAD], bias=right[BAD].bias + torch.linspace(-30, 30, 48)),
    }
    assert serving(plain, [mixed] * 2, FOLDS) == [GOOD]
    model, before, after, note = adopt_if_better(plain, [mixed] * 3, FOLDS)
    assert after > before + 3
    assert [after] == sqnr_db(FOLDS, [model] * 2)
    assert torch.equal(model.net.get_submodule(BAD).bias, plain.net.get_submodule(BAD).bias)
    assert note.startswith("the 1 of 2 layers that serve the output: ")


def test_what_harms_is_dropped(rounded):
    plain, _, wrong = rounded
    model, before, after, note = adopt_if_better(plain, [{BAD: wrong[BAD]}] * 3, FOLDS)
    assert model is plain
    assert after == before
    assert note.startswith("dropped: ")
