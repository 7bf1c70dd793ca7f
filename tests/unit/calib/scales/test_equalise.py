import dataclasses

import pytest
import torch
from torch import nn

from calib.judge.first_order import PROJECTIONS, output_gradients
from calib.methods import rtn
from calib.network.fold import fold_affine
from calib.network.layer_rows import Extremes, Means, look_at_inputs, product, sample_rows, weight_matrix
from calib.network.qdq import quantized_net
from calib.quantizer import channel_qparams
from calib.scales.calibrate import Config as CalibrateConfig
from calib.scales.calibrate import calibrate
from calib.scales.channel_scale import FoldScale, channel_scale
from calib.scales.equalise import Config, equalise, grids_of, input_noise, thresholds, weight_noise
from calib.structure.moves import ChannelClamp, along_inputs
from tests.tiny import TINY, half_of, tiny_batches, tiny_halves, tiny_model

FIXED = Config(exponents=(0.7,))


def uneven(family: str):
    """A model whose channels differ a hundredfold, and two halves of images."""
    model = fold_affine(tiny_model(family), tiny_batches(1)[0][:1])
    with torch.no_grad():
        for place in model.structure.places:
            module = model.net.get_submodule(place.producer)
            if isinstance(module, nn.LayerNorm):
                module.weight.mul_(torch.logspace(-1, 1, len(module.weight)))
                module.bias.add_(torch.linspace(-2, 2, len(module.bias)))
    return dataclasses.replace(model, float_net=model.net), tiny_halves(2)


@pytest.mark.parametrize("family", sorted(TINY))
def test_the_float_function_is_unchanged_in_float64(family):
    model, halves = uneven(family)
    model.net.double()
    halves = [half_of([batch.double() for batch in half]) for half in halves]
    moved = equalise(model, halves, FIXED)
    x = tiny_batches(1, seed=3)[0].double()
    with torch.no_grad():
        before, after = model.net(x), moved.net(x)
    count = len(model.structure.places)
    assert moved.history[-1].notes[0].startswith(f"channel scales moved at {count} of {count} places")
    assert float((after - before).norm() / before.norm()) < 1e-5


@pytest.mark.parametrize("family", sorted(TINY))
def test_every_family_has_places_and_the_input_model_is_untouched(family):
    model, halves = uneven(family)
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    equalise(model, halves, FIXED)
    assert model.structure.places
    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())


def test_behind_a_relu6_a_shift_lets_all_integers_be_used_unless_zeros_are_padded():
    model, halves = uneven("mobilenet")
    moved = equalise(model, halves, FIXED)
    x = tiny_batches(1, seed=3)[0]
    with torch.no_grad():
        torch.testing.assert_close(moved.net(x), model.net(x), rtol=1e-4, atol=1e-4)
    shifted = {reader for each in moved.moved if each.shift.any() for reader in each.readers}
    able = [place for place in model.structure.places if place.shifts]
    assert shifted <= {reader for place in able for reader in place.readers}
    can = {reader for place in able if place.limits for reader in place.readers}  # behind a ReLU6
    shifted &= can
    assert shifted <= can
    assert can
    for name, module in model.net.named_modules():
        if isinstance(module, nn.Conv2d) and name in can:
            assert module.kernel_size == (1, 1)
    before, after = Extremes(), Extremes()
    for found, net in ((before, model.net), (after, moved.net)):
        look_at_inputs(net, shifted, [batch for half in halves for batch in half], found, Means())
    for name in shifted:
        assert not (before.low[name] < 0).any()  # one-sided before, as far on either side now
        torch.testing.assert_close(after.low[name], -after.high[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [0.0, 2.5])
def test_a_relu6_in_other_units_is_a_clamp(shift):
    x, scale, m = torch.linspace(-5, 12, 40).reshape(1, 4, 10, 1), torch.rand(4) + 0.5, torch.full((4,), shift)
    along = [each.reshape(1, -1, 1, 1) for each in (scale, m)]
    clamp = ChannelClamp(-m / scale if shift else None, (6 - m) / scale)
    expected = (torch.nn.functional.relu6(x) - along[1]) / along[0]
    torch.testing.assert_close(clamp((x - along[1]) / along[0]), expected)


def test_exponent_one_gives_every_channel_the_same_range():
    low, high = torch.tensor([-1.0, -50.0, 0.0]), torch.tensor([3.0, 10.0, 0.2])
    scale, shift = channel_scale(low, high, 1.0, centred=False)
    reach = torch.maximum(high.abs(), low.abs()) / scale
    torch.testing.assert_close(reach, reach[:1].expand(3))
    assert not shift.any()
    scale, shift = channel_scale(low, high, 1.0, centred=True)
    torch.testing.assert_close((high - shift) / scale, -(low - shift) / scale)


def test_dead_and_huge_channels_stay_within_bounds():
    scale, _ = channel_scale(torch.tensor([0.0, -1.0, -1e6]), torch.tensor([0.0, 1.0, 1e6]), 1.0, centred=False)
    assert scale[0] == 1.0
    assert float(scale.max()) <= 100.0
    assert float(scale.min()) >= 0.01


def test_a_network_of_uneven_channels_is_rounded_better():
    model, halves = uneven("vit")
    x = tiny_batches(1, seed=3)[0]

    def error(candidate) -> float:
        quantized = rtn.nearest(calibrate(candidate, halves, CalibrateConfig("max"))).whole
        with torch.no_grad():
            return float((quantized_net(quantized)(x) - model.float_net(x)).pow(2).sum())

    assert error(equalise(model, halves, Config())) < 0.7 * error(model)


def test_exponents_are_chosen_on_the_other_half():
    """Channels that fire in the other half alone exceed the scales of this one: full equalisation is chosen less often."""
    model, _ = uneven("vit")
    quiet = tiny_batches(2, seed=1)
    generator = torch.Generator().manual_seed(5)
    loud = [batch * (1 + 7 * torch.rand(batch.shape, generator=generator).round()) for batch in quiet]
    config = Config(exponents=(0.0, 1.0), shift=False)
    same = equalise(model, [half_of(quiet)] * 2, config).equalised
    other = equalise(model, [half_of(quiet), half_of(loud)], config).equalised
    full = [sum(exponent for exponent, _ in found.values()) for found in (same, other)]
    assert full[1] < full[0] == len(same)


LAYERS = [
    nn.Linear(6, 4),
    nn.Conv2d(6, 4, 3, padding=1),
    nn.Conv2d(6, 6, 3, stride=2, groups=6),
    nn.Conv2d(6, 4, 1, groups=2),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_sampled_rows_are_the_layers_own_products(layer):
    x = torch.randn(2, 5, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 6, 7, 7)
    rows = sample_rows(layer, x, 40, torch.Generator().manual_seed(0))
    assert rows.shape[1:] == (weight_matrix(layer).shape[0], weight_matrix(layer).shape[2])
    with torch.no_grad():
        y = layer(x) - (layer.bias if isinstance(layer, nn.Linear) else layer.bias[:, None, None])
        outputs = y.reshape(-1, 4) if isinstance(layer, nn.Linear) else y.permute(0, 2, 3, 1).reshape(-1, y.shape[1])
        found = product(rows, weight_matrix(layer)).transpose(0, 1).reshape(40, -1)
    nearest = torch.cdist(found, outputs, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    assert float(nearest.max()) < 1e-4


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_weight_takes_over_what_its_input_is_divided_by(layer):
    x, values = (torch.randn(2, 5, 6), torch.rand(6) + 0.5) if isinstance(layer, nn.Linear) else (
        torch.randn(2, 6, 7, 7), torch.rand(6) + 0.5)  # fmt: skip
    divided = x / (values if isinstance(layer, nn.Linear) else values[:, None, None])
    with torch.no_grad():
        expected = layer(x)
        layer.weight.mul_(along_inputs(layer, values))
        torch.testing.assert_close(layer(divided), expected)
        layer.weight.div_(along_inputs(layer, values))


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_noise_of_weights_is_that_of_errors_drawn_at_random(layer, monkeypatch):
    monkeypatch.setattr("calib.judge.first_order.PROJECTIONS", 1000)
    torch.manual_seed(0)
    x, scale = torch.randn(1, 6) if isinstance(layer, nn.Linear) else torch.randn(1, 6, 5, 5), torch.rand(6) + 0.5
    net = nn.Sequential(layer)
    (seen,) = output_gradients(net, ["0"], x, weights_around={"0": torch.zeros(6)})
    step = channel_qparams(layer.weight * along_inputs(layer, scale)).scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
    drawn = 0.0
    with torch.no_grad():
        exact = net(x)
        for _ in range(400):
            kept = layer.weight.clone()
            layer.weight.add_((torch.rand_like(kept) - 0.5) * step / along_inputs(layer, scale))
            drawn += float((net(x) - exact).square().sum())
            layer.weight.copy_(kept)
    found = weight_noise(layer, seen.weights["0"], scale, 8) / 1000
    assert found == pytest.approx(drawn / 400, rel=0.2)  # 400 and 1000 samples


@pytest.mark.parametrize("sides", [None, (-0.25, 1.0)])
def test_noise_of_inputs_is_that_of_rounding_them(sides):
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 3), torch.randn(64, 8)
    net = nn.Sequential(layer)
    scale = FoldScale(torch.linspace(-1, 1, 8), torch.rand(8) + 0.5, 1.0, sides)
    amax = float(((x - scale.centre) * scale.factor).abs().max())
    grids = grids_of(amax, 4, sides)
    found = torch.zeros(len(grids), dtype=torch.float64)
    for seen in output_gradients(net, ["0"], x):
        found += input_noise(seen.inputs["0"], seen.gradients["0"], scale, grids, -1, seen.images) / PROJECTIONS
    for threshold, noise in zip(thresholds(4), found, strict=True):
        low, high = sides or (-1.0, 1.0)
        step = float(torch.tensor(amax * threshold * (high - low) / (15 if sides else 14)).half())
        lowest = round(amax * threshold * low / step) if sides else -8
        z = ((x - scale.centre) * scale.factor / step).round().clamp(lowest, lowest + 15) * step
        with torch.no_grad():
            expected = (net(z / scale.factor + scale.centre) - net(x)).square().sum()
        assert float(noise / expected) == pytest.approx(1, abs=0.35)  # 256 samples of the mean
