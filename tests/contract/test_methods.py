"""The promise of every file in calib/methods/: what it offers is a network whose output has less error than one rounded to
nearest, on images it was not fitted on."""

import copy
import functools
import itertools
import pkgutil
from dataclasses import replace

import pytest
import torch

import calib.methods
from calib.errors import UserError
from calib.grids import WeightGroups
from calib.images.batches import ROTATIONS, Half, Part
from calib.judge.held_out import Offer, challenge, choose
from calib.methods import rtn
from calib.network.fold import fold_affine
from calib.network.qdq import quantized_net
from calib.precision import Precision
from calib.scales.calibrate import Config, calibrate
from deploy.recipe import method_module
from tests.tiny import SIZE, rounded, same_numbers, tiny_model

METHODS = [item.name for item in pkgutil.iter_modules(calib.methods.__path__)]
OPTIONS = {"rtn": {"bias_correction": True}}


def correlated(seed, batch=8):
    """Images of large blobs of one colour each, bright on average: neighbouring inputs of a layer are alike."""
    generator = torch.Generator().manual_seed(seed)
    blobs = torch.randn(batch, 3, SIZE // 8, SIZE // 8, generator=generator) + 0.5
    blobs = torch.nn.functional.interpolate(blobs, size=(SIZE, SIZE), mode="bilinear")
    return blobs + 0.1 * torch.randn(batch, 3, SIZE, SIZE, generator=generator)


def correlated_halves():
    return [
        Half(tuple(Part([correlated(10 * half + 3 * part + one) for one in range(2)]) for part in range(2)))
        for half in range(2)
    ]


@functools.cache
def calibrated(family):
    """A tiny network with weights of 4 bits, inputs of 8; nobody edits it."""
    model = replace(tiny_model(family), precision=Precision(4, 8, 8))
    return calibrate(fold_affine(model, correlated(0)[:1]), correlated_halves(), Config("max"))


def offered(module, family="vit", **options):
    model = calibrated(family)
    return module.candidates(model, rtn.nearest(model), correlated_halves(), module.Config(**options))


def output_error(model):
    """On images that no method has seen."""
    net = quantized_net(model)
    with torch.no_grad():
        return sum(float((net(x) - model.float_net(x)).square().sum()) for x in map(correlated, range(90, 94)))


def models_of(candidate):
    """All networks of a candidate: those of its trials, then the one fitted on all images."""
    return [*(model for models in candidate.trials for model in models if model is not None), candidate.whole]


def assert_less_error_than_nearest(offer, family):
    assert offer.candidates, "nothing is offered"
    errors = [output_error(candidate.whole) for candidate in offer.candidates]
    assert min(errors) < output_error(rtn.nearest(calibrated(family)).whole)


@functools.cache
def offer_of(method, family):
    return offered(method_module(method), family, **OPTIONS.get(method, {}))


@pytest.mark.parametrize("family", ["vit", "mobilenet"])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_offered_has_less_error_than_round_to_nearest(method, family):
    assert_less_error_than_nearest(offer_of(method, family), family)


@pytest.mark.parametrize("family", ["vit", "mobilenet"])
@pytest.mark.parametrize("offers", [lambda model: [rtn.nearest(model)], lambda _model: []], ids=["nearest", "nothing"])
def test_a_method_that_only_rounds_to_nearest_does_not_pass(offers, family):
    with pytest.raises(AssertionError):
        assert_less_error_than_nearest(Offer(offers(calibrated(family))), family)


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_gives_the_same_numbers_and_the_input_model_is_untouched(method):
    model = calibrated("vit")
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    quantizers = dict(model.quantizers)
    again = offered(method_module(method), **OPTIONS.get(method, {})).candidates
    for one, other in zip(offer_of(method, "vit").candidates, again, strict=True):
        assert one.name == other.name
        for first, second in zip(models_of(one), models_of(other), strict=True):
            numbers = quantized_net(second).state_dict()
            for name, value in quantized_net(first).state_dict().items():
                assert torch.equal(value, numbers[name]), name
    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())
    assert model.quantizers == quantizers


@pytest.mark.parametrize("method", METHODS)
def test_every_candidate_rounds_every_layer_to_the_bits_asked_for(method):
    for candidate in offer_of(method, "vit").candidates:
        for model in models_of(candidate):
            assert set(model.quantized_layers) == set(model.layers)
            net = quantized_net(model)
            for layer in model.layers:
                bits = model.bits(layer).weight
                assert model.qparams(f"{layer}:weight").bits == bits
                integers = net.get_submodule(layer).get_buffer("integers")
                assert integers.dtype == torch.int8
                assert 1 < int(integers.abs().max()) < 2 ** (bits - 1)


@pytest.mark.parametrize("method", METHODS)
def test_weights_in_groups_are_rounded_or_refused_in_one_line(method):
    model, module = replace(calibrated("vit"), precision=Precision(4, 8, 8, weight_group=16)), method_module(method)
    config = module.Config(**OPTIONS.get(method, {}))
    if method == "rtn":
        for candidate in module.candidates(model, rtn.nearest(model), correlated_halves(), config).candidates:
            assert all(isinstance(candidate.whole.quantizers[f"{name}:weight"], WeightGroups) for name in model.layers)
        return
    with pytest.raises(UserError, match=r"^\[precision\] weight_group = 16 is for \[method\] name = 'rtn'") as caught:
        module.candidates(model, rtn.nearest(model), correlated_halves(), config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_fitted_on_a_half_does_not_depend_on_the_images_of_the_other_that_judge_it(method):
    """Images that judge change a little, so that what both halves chose together stays chosen."""
    first, second = correlated_halves()
    nearby = Part([batch + 1e-3 * correlated(99) for batch in second.parts[1]])
    model, module = calibrated("vit"), method_module(method)
    options = OPTIONS.get(method, {}) | ({"ridges": (0.1,)} if method == "erq" else {})  # ridges compete across halves
    config = module.Config(**options)
    found = module.candidates(model, rtn.nearest(model), [first, second], config).candidates
    changed = module.candidates(model, rtn.nearest(model), [first, Half((second.parts[0], nearby))], config).candidates
    for one, other in zip(found, changed, strict=True):
        assert same_numbers(one.trials[0][0], other.trials[0][0])
        if one.trials[0][1] is not None:
            assert not same_numbers(one.trials[0][1], other.trials[0][1]), "fitted on images that do not matter"
            assert not same_numbers(one.whole, other.whole)


def judged_db(by_rotation, tried):
    """Output SQNR of the trials `tried`, (rotation, half), on the images of the other half that judge in this rotation.

    `by_rotation`: the candidate of each rotation.
    """
    signal = noise = 0.0
    for rotation, half in tried:
        model = by_rotation[rotation].trials[rotation][half]
        net = quantized_net(model)
        with torch.no_grad():
            for x in correlated_halves()[1 - half].parts[ROTATIONS[rotation][1]]:
                exact = model.float_net(x).double()
                signal, noise = signal + exact.square().sum(), noise + (net(x) - exact).square().sum()
    return float(10 * torch.log10(signal / noise))


@pytest.mark.parametrize("method", METHODS)
def test_the_record_says_what_the_output_was_before_and_is_after(method):
    model, halves, module = calibrated("vit"), correlated_halves(), method_module(method)
    plain, options = rtn.nearest(model), OPTIONS.get(method, {})
    if method != "rtn":
        plain, _, _ = challenge(plain, [rtn.bias_corrected(plain.whole, halves)], halves)
    offers = module.candidates(model, plain, halves, module.Config(**options)).candidates
    tried = [(r, half) for r in range(2) for half in range(2) if offers[0].trials[r][half] is not None]
    found = rounded(model, halves, method, **options)
    record = found.history[-1]
    assert record.stage == method
    assert record.sqnr_before_db == pytest.approx(judged_db([plain] * 2, tried), abs=1e-6)
    (kept,) = [each for each in (plain, *offers) if same_numbers(each.whole, found)]
    chosen = [plain] * 2 if kept is plain else [offers[index] for index in choose(offers, halves)[0]]
    assert record.sqnr_after_db == pytest.approx(judged_db(chosen, tried), abs=1e-6)
    assert record.notes[0].startswith("dropped: " if kept is plain else f"{kept.name}: output SQNR ")


def test_what_is_dropped_is_said(monkeypatch):
    """A candidate that the judge rejects leaves no trace but its figures."""
    model, halves, worse = calibrated("vit"), correlated_halves(), copy.deepcopy(calibrated("vit").net)
    worse.blocks[0].mlp.fc2.bias.data += 1.0
    bad = rtn.nearest(replace(model, net=worse))
    monkeypatch.setattr("calib.methods.gptq.candidates", lambda *_: Offer([replace(bad, name="worse")], ("made",)))
    found = rounded(model, halves, "gptq")
    record = found.history[-1]
    assert record.notes[0].startswith("dropped: worse: output SQNR ")
    assert record.notes[1].startswith("before it: bias correction: output SQNR ")
    assert record.notes[2] == "made"
    assert record.sqnr_after_db == record.sqnr_before_db
    assert (
        f"{judged_db([bad] * 2, itertools.product((0, 1), (0, 1))):.2f} dB against {record.sqnr_before_db:.2f} dB"
        in record.notes[0]
    )
    assert torch.equal(found.net.blocks[0].mlp.fc2.weight, model.net.blocks[0].mlp.fc2.weight)
