from dataclasses import replace

import pytest
import torch
from torch import nn

from calib.judge.held_out import Candidate, challenge
from calib.methods import adaq, rtn
from calib.network.qdq import quantized_net
from calib.network.rounded_layer import (
    augmented_weight,
    rounded_layer,
    rounded_layers,
    with_gain_and_offset,
    with_layers,
)
from calib.precision import Precision
from calib.quantizer import fp16_scale, quantize
from tests.tiny import calibrated, output_db, tiny_halves


def planted(model, low, high):
    """`model`, already rounded, with gains from `low` to `high` and offsets planted in every layer."""
    changed = {}
    for name, layer in rounded_layers(model).items():
        gain = torch.linspace(low, high, layer.bias.numel()).reshape(layer.bias.shape)
        changed[name] = with_gain_and_offset(layer, gain, gain - 1)
    return with_layers(model, changed)


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


def test_integers_stay_and_the_engine_computes_them_again():
    halves = tiny_halves(1)
    plain = rtn.nearest(calibrated("vit", halves)).whole
    found, layers = planted(plain, 0.7, 1.3), rounded_layers(plain)
    for name in layers:
        weight, quantizer = found.net.get_parameter(f"{name}.weight"), found.quantizers[f"{name}:weight"]
        assert torch.equal(quantize(weight, quantizer).flatten(), layers[name].integers.flatten()), name
        assert torch.equal(quantizer.fake_quantize(weight), weight), name
    for before, after in zip(quantized_net(plain).buffers(), quantized_net(found).buffers(), strict=True):
        assert before.dtype != torch.int8 or torch.equal(before, after)


def test_the_network_is_nearer_to_float_on_images_no_half_held():
    halves = tiny_halves(8)
    model = calibrated("vit", halves, Precision(weights=4))
    plain = rtn.nearest(model)
    found, gain, _ = challenge(plain, adaq.candidates(model, plain, halves, adaq.Config()).candidates, halves)
    assert output_db(found.whole) > output_db(plain.whole) + 0.3
    assert gain.after_db > gain.before_db + 0.3


def test_a_net_dequantized_with_wrong_scales_is_repaired():
    halves = tiny_halves(4)
    model = calibrated("vit", halves)
    right = rtn.nearest(model).whole
    broken = Candidate.unfitted("broken", planted(right, 0.9, 1.1))
    offer = adaq.candidates(model, broken, halves, adaq.Config())
    found, _, _ = challenge(broken, offer.candidates, halves)
    assert output_db(broken.whole) < output_db(right) - 3
    assert output_db(found.whole) > output_db(right) - 0.5
    assert offer.notes == ("8 of 8 layers corrected",)


def quarters(layer, rounded, x, x_rounded):
    """Sums of two halves of two parts each."""
    pairs = zip(x.chunk(4), x_rounded.chunk(4), strict=True)
    one, two, three, four = (sums_of(layer, rounded, pair) for pair in pairs)
    return [[one, two], [three, four]]


def offsets(*shifts):
    """A shift for each quarter of 2000 rows."""
    return torch.tensor(shifts).repeat_interleave(500)[:, None, None]


def test_a_correction_has_to_help_on_the_other_half():
    layer, x_rounded = linear(), rows_of_input()[1]
    rounded = rounded_layer(layer)
    contrary = quarters(layer, rounded, x_rounded + offsets(-0.5, -0.5, 0.5, 0.5), x_rounded)
    assert adaq.best_correction(contrary) == ((None, None), None)
    agreeing = quarters(layer, rounded, x_rounded + offsets(0.5, 0.5, 0.6, 0.6), x_rounded)
    trials, whole = adaq.best_correction(agreeing)
    sets = [*(trial for of_rotation in trials for trial in of_rotation), whole]
    rows = [slice(1000), slice(1000, None), slice(1000), slice(1000, None), slice(None)]
    for found, part in zip(sets, rows, strict=True):
        x = x_rounded + offsets(0.5, 0.5, 0.6, 0.6)
        of_part = sums_of(layer, rounded, (x[part], x_rounded[part]))
        expected = with_gain_and_offset(rounded, *adaq.correction(of_part))
        torch.testing.assert_close(found.bias, expected.bias, rtol=0, atol=1e-6)
        assert torch.equal(found.params.scale, expected.params.scale)
    assert not torch.equal(trials[0][0].bias, trials[0][1].bias)


def test_each_rotation_asks_its_own_part_of_the_other_half():
    """The halves agree on their first parts; on the second one, what the other half teaches harms."""
    layer, x_rounded = linear(), rows_of_input()[1]
    shifted = x_rounded + offsets(0.5, -0.4, 0.5, -0.4)
    trials, whole = adaq.best_correction(quarters(layer, rounded_layer(layer), shifted, x_rounded))
    assert trials[0] is not None
    assert trials[1] is None
    assert whole is not None


def test_layers_that_gain_nothing_are_left_alone(monkeypatch):
    halves = tiny_halves(2)
    model = calibrated("vit", halves)
    monkeypatch.setattr(adaq, "correction", lambda sums: (torch.ones_like(sums.gain()), torch.ones_like(sums.gain())))
    offer = adaq.candidates(model, rtn.nearest(model), halves, adaq.Config())
    assert offer.candidates == []
    assert offer.notes == ("0 of 8 layers corrected",)


@pytest.mark.parametrize("rows", [0, -1])
def test_impossible_options_are_refused(rows):
    with pytest.raises(ValueError, match=f"rows {rows} is not a positive number"):
        adaq.Config(rows)
