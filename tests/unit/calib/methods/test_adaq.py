from dataclasses import replace

import pytest
import torch
from torch import nn

from calib.judge.held_out import sqnr_db
from calib.methods import adaq, rtn
from calib.network.fold import fold_affine
from calib.network.qdq import quantized_net
from calib.network.rounded_layer import augmented_weight, rounded_layer, with_gain_and_offset, with_layers
from calib.quantizer import fp16_scale, quantize
from calib.scales.calibrate import Config as CalibrateConfig
from calib.scales.calibrate import calibrate
from tests.tiny import tiny_batches, tiny_model


def calibrated(family="vit"):
    folds = [tiny_batches(4, seed=1), tiny_batches(4, seed=2)]
    model = fold_affine(tiny_model(family), folds[0][0][:1])
    return calibrate(model, folds, CalibrateConfig("max")), folds


def planted(model, low, high):
    """`model`, already rounded, with gains from `low` to `high` and offsets planted in every layer; the layers before."""
    layers = {
        name: rounded_layer(model.net.get_submodule(name), model.quantizers[f"{name}:weight"])
        for name in model.quantized_layers
    }
    changed = {}
    for name, layer in layers.items():
        gain = torch.linspace(low, high, layer.bias.numel()).reshape(layer.bias.shape)
        changed[name] = with_gain_and_offset(layer, gain, gain - 1)
    return with_layers(model, changed), layers


def linear(columns=12, rows=6):
    torch.manual_seed(0)
    return nn.Linear(columns, rows).requires_grad_(False)


def rows_of_input(count=2000, columns=12):
    x = torch.randn(count, 1, columns, generator=torch.Generator().manual_seed(1)) + 0.3
    return x, torch.round(x / 0.4) * 0.4


def sums_of(layer, rounded, *pairs):
    sums = adaq.ChannelSums(augmented_weight(layer), rounded)
    for pair in pairs:
        sums.update(*pair)
    return sums


def output_rows(layer, rounded, x, x_rounded):
    """t and z of the module's docstring, float64 (T, N), the long way."""
    z = x_rounded[:, 0].double() @ rounded.weight[0].double().T
    return layer.double()(x[:, 0].double()) - rounded.bias[0].double(), z


def test_gain_and_offset_are_the_least_squares_line_through_the_stored_rows():
    layer, (x, x_rounded) = linear(), rows_of_input()
    rounded = rounded_layer(layer)
    sums = sums_of(layer, rounded, (x[:700], x_rounded[:700]), (x[700:], x_rounded[700:]))
    t, z = output_rows(layer, rounded, x, x_rounded)
    for channel in range(6):
        line = torch.stack([z[:, channel], torch.ones(len(z))], 1)
        gain, offset = torch.linalg.lstsq(line, t[:, channel]).solution
        assert float(sums.gain()[0, channel]) == pytest.approx(float(gain), abs=1e-6)  # y is computed in float32
        assert float(sums.offset(sums.gain())[0, channel]) == pytest.approx(float(offset), abs=1e-6)
    gain, offset = torch.full((1, 6), 0.9), torch.full((1, 6), 0.05)
    assert sums.error(gain, offset) == pytest.approx(float((t - 0.9 * z - 0.05).square().sum()), rel=1e-5)


def test_planted_gain_and_offset_are_found():
    """Integers meant for the layer, dequantized with wrong scales and added to a wrong bias."""
    layer, (x, _) = linear(), rows_of_input()
    right = rounded_layer(layer)
    layer.weight.copy_(right.weight[0])
    planted = torch.tensor([[0.8, 0.9, 1.0, 1.1, -0.7, -1.25]])
    wrong = replace(
        right, params=replace(right.params, scale=right.params.scale / planted[0].abs()), bias=right.bias - 0.3
    )
    wrong = replace(wrong, integers=wrong.integers * planted.sign()[..., None].to(torch.int8))
    sums = sums_of(layer, wrong, (x, x))
    torch.testing.assert_close(sums.gain().float(), planted, rtol=1e-5, atol=0)
    found = with_gain_and_offset(wrong, *adaq.correction(sums))
    assert torch.equal(found.integers, right.integers)
    torch.testing.assert_close(found.params.scale, right.params.scale, rtol=2**-11, atol=0)
    torch.testing.assert_close(found.bias, right.bias, rtol=0, atol=1e-3)


def test_the_corrected_layer_is_the_gain_and_offset_on_the_output():
    layer, (x, x_rounded) = linear(), rows_of_input()
    rounded = rounded_layer(layer)
    sums = sums_of(layer, rounded, (x, x_rounded))
    gain, offset = adaq.correction(sums)
    gain[0, 2] = -gain[0, 2]
    found = with_gain_and_offset(rounded, gain, offset)
    _, z = output_rows(layer, rounded, x, x_rounded)
    y = x_rounded[:, 0].double() @ found.weight[0].double().T + found.bias[0]
    torch.testing.assert_close(y, gain[0] * z + rounded.bias[0] + offset[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(found.params.scale, fp16_scale(found.params.scale))
    assert (found.params.scale > 0).all()
    assert torch.equal(found.integers.abs(), rounded.integers.abs())
    assert torch.equal(found.integers[0, 2], -rounded.integers[0, 2])


def test_no_gain_or_offset_beats_the_one_found_at_its_fp16_scale():
    layer, (x, x_rounded) = linear(), rows_of_input()
    sums = sums_of(layer, rounded_layer(layer), (x, x_rounded))
    gain, offset = adaq.correction(sums)
    least = sums.error(gain, offset)
    assert least < sums.error(torch.ones_like(gain), torch.zeros_like(gain))
    assert all(sums.error(gain, offset + step) > least for step in (-1e-3, 1e-3))
    assert all(sums.error(gain * factor, sums.offset(gain * factor)) > least for factor in (0.99, 1.01))


def test_a_channel_that_never_varies_keeps_its_scale():
    layer, (x, x_rounded) = linear(), rows_of_input()
    layer.weight[3] = 0
    rounded = rounded_layer(layer)
    sums = sums_of(layer, rounded, (x, x_rounded))
    assert sums.gain()[0, 3] == 1
    found = with_gain_and_offset(rounded, *adaq.correction(sums))
    assert found.params.scale[3] == rounded.params.scale[3]
    assert torch.isfinite(found.weight).all()


@pytest.mark.parametrize("base", adaq.BASES)
def test_integers_stay_and_the_engine_computes_them_again(base):
    model, folds = calibrated()
    reduce_base, options = adaq.BASES[base]
    plain = reduce_base(model, folds, options)
    found, layers = planted(plain, 0.7, 1.3)
    for name in layers:
        weight, quantizer = found.net.get_parameter(f"{name}.weight"), found.quantizers[f"{name}:weight"]
        assert torch.equal(quantize(weight, quantizer).flatten(), layers[name].integers.flatten()), name
        assert torch.equal(quantizer.fake_quantize(weight), weight), name
    for before, after in zip(quantized_net(plain).buffers(), quantized_net(found).buffers(), strict=True):
        assert before.dtype != torch.int8 or torch.equal(before, after)


@pytest.mark.parametrize("base", adaq.BASES)
def test_it_stands_on_the_base_and_is_never_worse_on_other_photographs(base):
    model, folds = calibrated()
    found = adaq.reduce_error(model, folds, adaq.Config(base))
    assert [record.stage for record in found.history[-2:]] == [base, "adaq"]
    assert found.history[-1].sqnr_after_db >= found.history[-1].sqnr_before_db


def test_a_net_dequantized_with_wrong_scales_is_repaired(monkeypatch):
    model, folds = calibrated()
    right = rtn.reduce_error(model, folds, rtn.Config())
    broken, _ = planted(right, 0.9, 1.1)
    monkeypatch.setitem(adaq.BASES, "rtn", (lambda *_: broken, None))
    found = adaq.reduce_error(model, folds, adaq.Config())
    new = [tiny_batches(4, seed=9)]
    exact, harmed, repaired = sqnr_db(new, [right], [broken], [found])
    assert harmed < exact - 3
    assert repaired > exact - 0.5
    assert found.history[-1].notes[0].startswith("8 of 8 layers corrected")


def test_a_correction_has_to_help_across_folds():
    layer, x_rounded = linear(), rows_of_input()[1]
    rounded, halves = rounded_layer(layer), (slice(1000), slice(1000, None))
    contrary = [sums_of(layer, rounded, (x_rounded + shift, x_rounded)) for shift in (-0.5, 0.5)]
    assert adaq.best_fits(contrary) == ()
    agreeing = [sums_of(layer, rounded, (x_rounded[half] + 0.5, x_rounded[half])) for half in halves]
    fits = adaq.best_fits(agreeing)
    assert len(fits) == 3
    whole = sums_of(layer, rounded, (x_rounded + 0.5, x_rounded))
    torch.testing.assert_close(
        fits[-1].bias, with_gain_and_offset(rounded, *adaq.correction(whole)).bias, rtol=0, atol=1e-6
    )
    assert not torch.equal(fits[0].bias, fits[1].bias)


def test_layers_that_gain_nothing_are_left_alone(monkeypatch):
    model, folds = calibrated()
    monkeypatch.setattr(adaq, "correction", lambda sums: (torch.ones_like(sums.gain()), torch.ones_like(sums.gain())))
    found = adaq.reduce_error(model, folds, adaq.Config())
    reduce_base, options = adaq.BASES["rtn"]
    base = reduce_base(model, folds, options).net.state_dict()
    assert all(torch.equal(value, base[name]) for name, value in found.net.state_dict().items())
    assert found.history[-1].notes[0].startswith("0 of 8")


@pytest.mark.parametrize("options", [{"base": "rtm"}, {"rows": 0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        adaq.Config(**options)
