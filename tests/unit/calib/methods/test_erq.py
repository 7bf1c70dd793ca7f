from dataclasses import replace

import pytest
import torch
from torch import nn

from calib.layerwise import layer_fits
from calib.layerwise.layer_sums import LayerSums, add_inputs, pooled
from calib.layerwise.subsets import layer_candidates
from calib.methods import erq, rtn
from calib.network.layer_rows import rows_of, sample_rows
from calib.network.rounded_layer import RoundedLayer, augmented_weight, rounded_layer, with_layers
from calib.precision import Precision
from calib.quantizer import QParams, quantize
from tests.tiny import TINY, calibrated, output_db, same_numbers, tiny_batches, tiny_halves, tiny_model
from tests.tiny import rounded as rounded_net


def coarse_rows(count=4096, columns=24, step=0.7, seed=0):
    """Correlated rows x (T, 1, K) and x rounded so coarsely that the error can be predicted from x^."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -1.5, columns)
    x = (torch.randn(count, columns, generator=generator) @ mix + 0.2)[:, None]
    return x, torch.round(x / step) * step


def layer_of(columns=24, rows=10, seed=1, bias=True):
    torch.manual_seed(seed)
    return nn.Linear(columns, rows, bias=bias).requires_grad_(False)


def sums_of(layer, *pairs):
    sums = LayerSums(augmented_weight(layer))
    for x, rounded in pairs:
        sums.update(x, rounded)
    return sums


def direct_error(layer, found, x, rounded):
    y = layer(x)[:, 0].double()
    return float((rounded[:, 0].double() @ found.augmented[0, :, :-1].T + found.augmented[0, :, -1] - y).pow(2).sum())


def test_the_error_from_sums_is_the_error_of_the_rows():
    layer, (x, rounded) = layer_of(), coarse_rows()
    sums = sums_of(layer, (x[:1000], rounded[:1000]), (x[1000:], rounded[1000:]))
    found = rounded_layer(layer)
    assert sums.count == len(x)
    assert sums.error(found) == pytest.approx(direct_error(layer, found, x, rounded), rel=1e-4)  # float32 layer


def test_input_repair_is_the_ridge_regression_of_the_stored_rows():
    layer, (x, rounded) = layer_of(), coarse_rows()
    sums = sums_of(layer, (x, rounded))
    ridge = 0.05
    found = erq.compensated_weight(sums, sums.moment(ridge))[0]
    # Explicit ridge: penalty rows under the design matrix.
    design = torch.cat([rounded[:, 0], torch.ones(len(x), 1)], 1).double()
    target = layer(x)[:, 0].double() - design @ sums.weight[0].T
    penalty = (ridge * design[:, :-1].square().mean() * len(x)).sqrt() * torch.eye(design.shape[1])
    stacked = torch.cat([design, penalty]), torch.cat([target, torch.zeros(design.shape[1], target.shape[1])])
    change = torch.linalg.lstsq(*stacked).solution.T
    torch.testing.assert_close(found - sums.weight[0], change, rtol=1e-4, atol=1e-6)  # the target is float32


def test_input_repair_lowers_the_error_fades_with_the_ridge_and_needs_an_error():
    layer, (x, rounded) = layer_of(), coarse_rows()
    sums = sums_of(layer, (x, rounded))

    def error(weight):
        change = weight - sums.weight
        return sums.spent + float((change * (change @ sums.square - 2 * sums.cross)).sum())

    before = error(sums.weight)
    assert error(erq.compensated_weight(sums, sums.moment(1e-6))) < 0.8 * before
    faded = erq.compensated_weight(sums, sums.moment(1e9)) - sums.weight
    assert faded.abs().max() < 1e-9
    exact = sums_of(layer, (x, x))
    assert not (erq.compensated_weight(exact, exact.moment(1e-3)) - exact.weight).any()


def test_default_ridges_are_strong_enough_to_matter_and_weak_enough_to_act():
    """At the 8 bits of an engine, on inputs like a LayerNorm's: the change of the weights is no rounding noise."""
    layer, (x, _) = layer_of(), coarse_rows()
    params = QParams(x.abs().max() / 127)
    sums = sums_of(layer, (x, params.fake_quantize(x)))
    for ridge in erq.Config().ridges:
        change = erq.compensated_weight(sums, sums.moment(ridge)) - sums.weight
        assert 1e-4 < float(change.norm() / sums.weight.norm()) < 0.2, ridge


def test_a_calibration_set_seen_twice_gives_the_same_fit():
    layer, (x, rounded) = layer_of(), coarse_rows()
    once, twice = sums_of(layer, (x, rounded)), sums_of(layer, (x, rounded), (x, rounded))
    merged = pooled([once, once])
    for other in (twice, merged):
        first, second = erq.fit(once, 0.01), erq.fit(other, 0.01)
        assert torch.equal(first.integers, second.integers)
        torch.testing.assert_close(first.bias, second.bias)


def test_both_steps_help_on_new_rows_and_together_most():
    layer = layer_of(rows=64)
    (x, rounded), (new, new_rounded) = coarse_rows(8192, seed=0), coarse_rows(8192, seed=0)
    x, rounded, new, new_rounded = x[:4096], rounded[:4096], new[4096:], new_rounded[4096:]
    fitted = erq.fit(sums_of(layer, (x, rounded)), 0.001)
    plain = direct_error(layer, rounded_layer(layer), new, new_rounded)
    assert direct_error(layer, fitted, new, new_rounded) < 0.8 * plain


def sums_of_layers(model, batches, rows):
    sums = {name: LayerSums(augmented_weight(model.net.get_submodule(name))) for name in model.layers}
    add_inputs(sums, model, batches, rows)
    return sums


@pytest.mark.parametrize("family", sorted(TINY))
def test_weights_lie_on_the_grid_the_engine_stores(family):
    halves = tiny_halves(1)
    model = calibrated(family, halves)
    fits = {name: erq.fit(sums, 0.1) for name, sums in sums_of_layers(model, halves[0], 64).items()}
    found = with_layers(model, fits)
    for name, fitted in fits.items():
        layer, params = found.net.get_submodule(name), found.quantizers[f"{name}:weight"]
        assert torch.equal(params.scale, params.scale.half().float())
        assert torch.equal(quantize(layer.weight, params).flatten(), fitted.integers.flatten()), name
        assert torch.equal(params.fake_quantize(layer.weight), layer.weight), name
        assert layer.bias.shape == (layer.weight.shape[0],)


@pytest.mark.parametrize("family", ["vit", "mobilenet"])
def test_sums_of_a_layer_tell_what_its_module_does(family):
    """Linear, dense, strided and depthwise convolutions: the error from sums is that of running the layer."""
    (batch,) = tiny_batches(1)
    model = calibrated(family, tiny_halves(2))
    sums = sums_of_layers(model, [batch], 1 << 30)
    plain = with_layers(model, {name: rounded_layer(model.net.get_submodule(name)) for name in sums})
    seen = {}

    def record(name):
        return lambda _module, args, output: seen.update({name: (args[0].clone(), output.clone())})

    for name in sums:
        model.net.get_submodule(name).register_forward_hook(record(name))
    with torch.no_grad():
        model.net(batch)
        for name, (x, y) in seen.items():
            actual = plain.net.get_submodule(name)(model.quantizers[f"{name}:input"].fake_quantize(x))
            expected = float((actual - y).double().pow(2).sum())
            assert sums[name].error(rounded_layer(model.net.get_submodule(name))) == pytest.approx(expected, rel=1e-3)


def quarters(layer, x, rounded):
    """Sums of two halves of two parts each."""
    pairs = zip(x.chunk(4), rounded.chunk(4), strict=True)
    one, two, three, four = (sums_of(layer, pair) for pair in pairs)
    return [[one, two], [three, four]]


def test_a_layer_that_rounds_to_nearest_better_is_left_alone():
    """Two halves that contradict each other: what one teaches harms on the other."""
    layer, (x, rounded) = layer_of(), coarse_rows()
    plain, ridges = rounded_layer(layer), erq.Config().ridges
    signs = torch.tensor([-3.0, 3.0]).repeat_interleave(len(x) // 2)[:, None, None]
    contrary = quarters(layer, rounded + signs * (x - rounded), rounded)
    assert layer_fits.best_fit(plain, ridges, erq.fit, contrary) == ((None, None), None)
    trials, whole = layer_fits.best_fit(plain, ridges, erq.fit, quarters(layer, x, rounded))
    assert [len(of_rotation) for of_rotation in trials] == [2, 2]
    assert whole is not None


def test_one_part_of_the_other_half_chooses_in_each_rotation_and_both_for_all_images():
    """Inputs lack 0.2 in the first parts and 0.6 in the second ones; an option is how much of that the bias adds."""
    layer, rounded = layer_of(), coarse_rows(count=400)[1]
    shifts = torch.tensor([0.2, 0.6, 0.2, 0.6]).repeat_interleave(100)[:, None, None]
    plain, seen = rounded_layer(layer), []

    def fit(sums, option):
        seen.append((sums.count, option))
        return replace(plain, bias=plain.bias + option * layer.weight.sum(1))

    options = (0.0, 0.2, 0.4, 0.6, 0.8)
    trials, whole = layer_fits.best_fit(plain, options, fit, quarters(layer, rounded + shifts, rounded))
    for option, layers in zip((0.2, 0.6, 0.4), (*trials, (whole,)), strict=True):
        for found in layers:
            assert torch.equal(found.bias, fit(LayerSums(augmented_weight(layer)), option).bias)
    assert (400, 0.4) in seen
    assert {(200, option) for option in options} <= {*seen}


def test_the_network_is_nearer_to_float_on_images_no_half_held():
    halves = tiny_halves(8)
    model = calibrated("vit", halves)
    found, plain = rounded_net(model, halves, "erq"), rounded_net(model, halves)
    assert output_db(found) > output_db(plain) + 0.3
    record = found.history[-1]
    assert record.sqnr_after_db > record.sqnr_before_db
    assert "layers fitted" in record.notes[-1]
    assert set(found.quantized_layers) == set(model.layers)


def test_the_numbers_of_a_trial_do_not_come_from_the_images_that_judge_it():
    """Fitted on one half: whatever the other half holds, each layer that is fitted has the same numbers."""
    halves, others = tiny_halves(8), tiny_halves(8, seed=7)
    model = calibrated("vit", halves, Precision(weights=4))
    config = erq.Config(ridges=(0.1,))

    def trials(*halves):
        *_, every = erq.candidates(model, rtn.nearest(model), halves, config).candidates
        return every.trials

    first, second = trials(*halves), trials(halves[0], others[1])
    plain, same = model.net.state_dict(), []
    for one, other in zip(first, second, strict=True):
        one, other = ([each.net.state_dict() for each in of_rotation] for of_rotation in (one, other))
        fitted = [name for name in plain if not any(torch.equal(each[name], plain[name]) for each in (*one, *other))]
        assert not any(torch.equal(one[1][name], other[1][name]) for name in fitted)
        same += [torch.equal(one[0][name], other[0][name]) for name in fitted]
    assert len(same) > 16
    assert all(same)


def test_a_fit_that_harms_the_output_is_dropped(monkeypatch):
    halves = tiny_halves(2)
    model = calibrated("vit", halves)

    def zero(plain, *_):
        layer = RoundedLayer(plain.integers * 0, plain.params, plain.bias)
        return layer_fits.LayerTrials(((layer, layer),) * 2, layer)

    monkeypatch.setattr(erq, "best_fit", zero)
    found = rounded_net(model, halves, "erq")
    biases = [rtn.nearest(model).whole, rtn.bias_corrected(rtn.nearest(model).whole, halves).whole]
    assert any(same_numbers(found, plain) for plain in biases)
    assert found.quantizers.keys() == biases[0].quantizers.keys()
    assert found.history[-1].notes[0].startswith("dropped: all 8 fitted layers: ")


def test_candidates_are_all_fitted_layers_and_those_that_serve_the_output():
    """One layer of the fits is right, all others ruin the network."""
    halves, good = tiny_halves(4), "blocks.0.mlp.fc1"
    model = calibrated("vit", halves, Precision(weights=4))
    right = rtn.nearest(calibrated("vit", halves)).whole
    fits = {}
    for name in model.layers:
        layer = rounded_layer(model.net.get_submodule(name), right.qparams(f"{name}:weight"))
        fits[name] = layer if name == good else RoundedLayer(layer.integers * 0, layer.params, layer.bias)
    found = layer_fits.FittedLayers([[fits, fits], [fits, fits]], fits)
    subset, every = layer_candidates(rtn.nearest(model), found, halves)
    assert (subset.name, every.name) == ("1 of 8 fitted layers", "all 8 fitted layers")
    for one in (subset.whole, *subset.trials[0], *subset.trials[1]):
        for name in model.layers:
            weight = fits[name].weight[0] if name == good else model.net.get_submodule(name).weight
            assert torch.equal(one.net.get_submodule(name).weight, weight), name
    assert not every.whole.net.get_submodule("blocks.1.mlp.fc1").weight.any()
    assert layer_candidates(rtn.nearest(model), layer_fits.FittedLayers([[{}, {}], [{}, {}]], {}), halves) == []


def test_layers_share_a_pass_within_memory(monkeypatch):
    model = tiny_model("vit")
    layers = list(model.layers)
    assert list(layer_fits.groups_of_layers(model)) == [layers]
    monkeypatch.setattr(layer_fits, "MEMORY", 1)
    assert list(layer_fits.groups_of_layers(model)) == [[name] for name in layers]


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(6, 4, 3, 2, 1), nn.Conv2d(6, 6, 3, 1, 1, groups=6)])
def test_all_rows_are_taken_if_they_are_few(layer):
    conv = isinstance(layer, nn.Conv2d)
    x = torch.randn(2, 6, 8, 8) if conv else torch.randn(2, 9, 6)
    every = rows_of(layer, x, 10_000, torch.Generator())
    with torch.no_grad():
        y = layer(x)
        y = y.permute(0, 2, 3, 1).reshape(-1, 4 if layer.weight.shape[0] == 4 else 6) if conv else y.reshape(-1, 4)
        weight = augmented_weight(layer).float()
        mine = torch.einsum("tgk,gnk->tgn", every, weight[..., :-1]) + weight[..., -1]
    torch.testing.assert_close(mine.reshape(len(y), -1), y)
    few = rows_of(layer, x, 5, torch.Generator().manual_seed(3))
    assert torch.equal(few, sample_rows(layer, x, 5, torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("options", [{"ridges": ()}, {"ridges": (0.0,)}, {"rows": 0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        erq.Config(**options)
