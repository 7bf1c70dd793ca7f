"""Shortcuts in INT8. Oracle: the quantized network, with the tensor rounded by a hook."""

from dataclasses import replace

import pytest
import torch

from calib.layerwise.int8_shortcuts import Config, int8_shortcuts, shortcuts
from calib.network.qdq import quantized_net
from calib.quantizer import qparams_from_amax
from tests.tiny import calibrated, output_db, rounded, tiny_batches, tiny_halves

HALVES = tiny_halves()
NAME, READER = "blocks.2.1", "blocks.2.2.conv_pw"


@pytest.fixture(scope="module")
def model():
    return rounded(calibrated("mobilenet", HALVES), HALVES)


@pytest.fixture(scope="module")
def found(model):
    return shortcuts(model, HALVES)


def test_one_quantizer_serves_all_readers(model, found):
    chosen = found.rounded(found.whole, found.together, [NAME])
    grid = chosen.quantizers[f"{NAME}:shortcut"]
    assert chosen.quantizers[f"{READER}:input"] is grid
    changed = {key for key, each in chosen.quantizers.items() if model.quantizers.get(key) is not each}
    assert changed == {f"{NAME}:shortcut", f"{READER}:input"}
    assert chosen.int8_shortcuts == (NAME,)
    assert chosen.quantized_layers == model.quantized_layers


def test_the_network_rounds_what_the_module_returns(model):
    grid = qparams_from_amax(torch.tensor(3.0))
    chosen = model.with_quantizers({f"{NAME}:shortcut": grid, f"{READER}:input": grid})
    by_hand = quantized_net(model.with_quantizers({f"{READER}:input": grid}))
    by_hand.get_submodule(NAME).register_forward_hook(lambda _m, _x, y: grid.fake_quantize(y))
    images = tiny_batches(1)[0]
    with torch.no_grad():
        assert torch.equal(quantized_net(chosen)(images), by_hand(images))
        assert not torch.equal(quantized_net(model)(images), by_hand(images))


def test_a_reader_that_stays_in_float_gets_no_quantizer(model):
    quantizers = {key: grid for key, grid in model.quantizers.items() if not key.startswith(READER)}
    found = shortcuts(replace(model, quantizers=quantizers), HALVES)
    assert found.quantizers({NAME: "grid"}) == {f"{NAME}:shortcut": "grid"}


def test_a_budget_is_spent_and_kept(model):
    chosen = int8_shortcuts(model, HALVES, Config(3.0))
    record = chosen.history[-1]
    assert chosen.int8_shortcuts
    assert record.stage == "int8_shortcuts"
    assert record.notes[0].startswith(f"{len(chosen.int8_shortcuts)} of 10 shortcuts in INT8: output SQNR ")
    assert output_db(chosen) >= output_db(model) - 3.5


def test_without_a_budget_or_a_shortcut_the_network_is_what_it_was(model):
    chosen = int8_shortcuts(model, HALVES, Config(0.0))
    assert replace(chosen, history=()) == replace(model, history=())
    bare = replace(model, structure=replace(model.structure, shortcuts={}))
    assert int8_shortcuts(bare, HALVES, Config()).history[-1].notes == (
        "no residual sum behind a quantized convolution",
    )
