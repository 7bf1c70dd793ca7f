import pytest
import torch
from torch import nn

from calib.judge.held_out import sqnr_db
from calib.layerwise import layer_fits
from calib.layerwise.layer_sums import LayerSums, add_inputs, pooled
from calib.methods import erq, rtn
from calib.network.fold import fold_affine
from calib.network.layer_rows import input_rows, rows_of, sample_rows
from calib.network.rounded_layer import RoundedLayer, augmented_weight, rounded_layer, with_layers
from calib.quantizer import QParams, quantize
from calib.scales.calibrate import Config as CalibrateConfig
from calib.scales.calibrate import calibrate
from tests.tiny import TINY, same_numbers, tiny_batches, tiny_model


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


def calibrated(family, batches=2):
    folds = [tiny_batches(batches, seed=1), tiny_batches(batches, seed=2)]
    model = fold_affine(tiny_model(family), folds[0][0][:1])
    return calibrate(model, folds, CalibrateConfig("max")), folds


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
    found = erq.make_up_for_inputs(sums, sums.moment(ridge))[0]
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
    assert error(erq.make_up_for_inputs(sums, sums.moment(1e-6))) < 0.8 * before
    faded = erq.make_up_for_inputs(sums, sums.moment(1e9)) - sums.weight
    assert faded.abs().max() < 1e-9
    exact = sums_of(layer, (x, x))
    assert not (erq.make_up_for_inputs(exact, exact.moment(1e-3)) - exact.weight).any()


def test_default_ridges_are_strong_enough_to_matter_and_weak_enough_to_act():
    """At the 8 bits of an engine, on inputs like a LayerNorm's: the change of the weights is no rounding noise."""
    layer, (x, _) = layer_of(), coarse_rows()
    params = QParams(x.abs().max() / 127)
    sums = sums_of(layer, (x, params.fake_quantize(x)))
    for ridge in erq.Config().ridges:
        change = erq.make_up_for_inputs(sums, sums.moment(ridge)) - sums.weight
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


@pytest.mark.parametrize("family", sorted(TINY))
def test_weights_lie_on_the_grid_the_engine_stores(family):
    model, folds = calibrated(family)
    sums = [sums_of_layers(model, batches, 64) for batches in folds]
    fits = {name: erq.fit(pooled([fold[name] for fold in sums]), 0.1) for name in sums[0]}
    found = with_layers(model, fits)
    for name, fitted in fits.items():
        layer, params = found.net.get_submodule(name), found.quantizers[f"{name}:weight"]
        assert torch.equal(params.scale, params.scale.half().float())
        assert torch.equal(quantize(layer.weight, params).flatten(), fitted.integers.flatten()), name
        assert torch.equal(params.fake_quantize(layer.weight), layer.weight), name
        assert layer.bias.shape == (layer.weight.shape[0],)


def sums_of_layers(model, batches, rows, source=None):
    sums = {name: LayerSums(augmented_weight(model.net.get_submodule(name))) for name in model.layers}
    add_inputs(sums, model, batches, rows, source)
    return sums


@pytest.mark.parametrize("family", ["vit", "mobilenet"])
def test_sums_of_a_layer_tell_what_its_module_does(family):
    """Linear, dense, strided and depthwise convolutions: the error from sums is that of running the layer."""
    model, folds = calibrated(family)
    fold = folds[0][:1]
    sums = sums_of_layers(model, fold, 1 << 30)
    plain = with_layers(model, {name: rounded_layer(model.net.get_submodule(name)) for name in sums})
    seen = {}

    def record(name):
        return lambda _module, args, output: seen.update({name: (args[0].clone(), output.clone())})

    for name in sums:
        model.net.get_submodule(name).register_forward_hook(record(name))
    with torch.no_grad():
        model.net(fold[0])
        for name, (x, y) in seen.items():
            actual = plain.net.get_submodule(name)(model.quantizers[f"{name}:input"].fake_quantize(x))
            expected = float((actual - y).double().pow(2).sum())
            assert sums[name].error(rounded_layer(model.net.get_submodule(name))) == pytest.approx(expected, rel=1e-3)


def test_a_layer_that_rounds_to_nearest_better_is_left_alone():
    """Two folds that contradict each other: what one teaches harms on the other."""
    layer, (x, rounded) = layer_of(), coarse_rows()
    folds = [sums_of(layer, (rounded + sign * (x - rounded), rounded)) for sign in (-3.0, 3.0)]
    assert erq.best_fits(rounded_layer(layer), folds, erq.Config()) == ()
    folds = [sums_of(layer, (x[half], rounded[half])) for half in (slice(2048), slice(2048, None))]
    assert len(erq.best_fits(rounded_layer(layer), folds, erq.Config())) == 3


def test_the_chosen_ridge_is_the_best_across_folds():
    layer, (x, rounded) = layer_of(), coarse_rows(count=160)
    (a, b) = folds = [sums_of(layer, (x[half], rounded[half])) for half in (slice(80), slice(80, None))]
    ridges = (1e-6, 0.01, 0.1)
    errors = [b.error(erq.fit(a, ridge)) + a.error(erq.fit(b, ridge)) for ridge in ridges]
    assert errors[1] == min(errors), "the case has to be decided by neither end"
    chosen = erq.best_fits(rounded_layer(layer), folds, erq.Config(ridges))[-1]
    assert torch.equal(chosen.integers, erq.fit(pooled(folds), 0.01).integers)


@pytest.mark.parametrize("propagate", [False, True])
def test_the_network_is_nearer_to_float_on_photographs_no_fold_held(propagate):
    model, folds = calibrated("vit", batches=8)
    found = erq.reduce_error(model, folds, erq.Config(propagate=propagate))
    record = found.history[-1]
    assert record.sqnr_after_db > record.sqnr_before_db
    new = [tiny_batches(4, seed=9)]
    fitted, plain = sqnr_db(new, [found], [rtn.reduce_error(model, folds, rtn.Config())])
    assert fitted > plain + 0.3
    assert "layers fitted" in record.notes[0]
    assert set(found.quantized_layers) == set(model.layers)


def test_a_fit_that_harms_the_output_is_dropped(monkeypatch):
    model, folds = calibrated("vit")

    def zero(plain, *_):
        return (RoundedLayer(plain.integers * 0, plain.params, plain.bias),) * 3

    monkeypatch.setattr(erq, "best_fits", zero)
    found = erq.reduce_error(model, folds, erq.Config())
    assert same_numbers(found, rtn.nearest(model, folds))
    assert found.quantizers.keys() == rtn.reduce_error(model, folds, rtn.Config()).quantizers.keys()
    assert found.history[-1].notes[1].startswith("dropped")


def test_a_propagated_fit_aims_at_the_float_output_from_rounded_inputs():
    model, folds = calibrated("vit")
    source = with_layers(model, {})
    for parameter in source.net.parameters():
        parameter.data.mul_(1.01)
    name = "blocks.1.mlp.fc2"
    params = model.quantizers[f"{name}:input"]
    sums = sums_of_layers(model, folds[0], 1 << 30, source.net)[name]
    exact, given = (list(input_rows(net, [name], folds[0], 1 << 30)) for net in (model.net, source.net))
    module = model.net.get_submodule(name)
    expected = sum(
        float((module(params.fake_quantize(b[name])) - module(a[name])).double().pow(2).sum())
        for a, b in zip(exact, given, strict=True)
    )
    assert sums.spent == pytest.approx(expected, rel=1e-4)


def test_layers_share_a_pass_within_memory_or_within_a_block(monkeypatch):
    model, _ = calibrated("vit")
    layers = list(model.layers)
    assert list(layer_fits.parts(model, 2, by_block=False)) == [layers]
    assert [len(part) for part in layer_fits.parts(model, 2, by_block=True)] == [4, 4]
    monkeypatch.setattr(layer_fits, "MEMORY", 1)
    assert list(layer_fits.parts(model, 2, by_block=False)) == [[name] for name in layers]


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
