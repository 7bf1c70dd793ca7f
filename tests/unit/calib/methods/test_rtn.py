import pytest
import torch
from torch import nn

from calib.methods import rtn
from calib.network.layer_rows import Extremes, Means, look_at_inputs
from calib.precision import UNROUNDED, Precision
from calib.quantizer import channel_qparams
from tests.tiny import TINY, calibrated, half_of, output_db, rounded, tiny_batches, tiny_halves, tiny_model


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 4), nn.Conv2d(6, 4, 3), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1, groups=2)], ids=str
)
def test_the_mean_output_is_that_of_the_exact_weight(layer):
    torch.manual_seed(0)
    x = torch.randn(400, 6) + 3 if isinstance(layer, nn.Linear) else torch.randn(40, 6, 12, 12) + 3
    params = channel_qparams(layer.weight, bits=3)
    means = Means()
    look_at_inputs(nn.Sequential(layer), ["0"], [x], means)
    with torch.no_grad():
        exact = layer(x).transpose(0, 1).flatten(1).mean(1)
        change = rtn.mean_correction(layer, params, means.of("0"))
        layer.weight.copy_(params.fake_quantize(layer.weight))
        rounded = layer(x).transpose(0, 1).flatten(1).mean(1)
    # a patch sees a little less of the edges than the channel's mean does
    tolerance = 0.05 * float((rounded - exact).abs().max())
    assert tolerance > 1e-4
    torch.testing.assert_close(rounded + change, exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", sorted(TINY))
def test_biases_of_every_family_follow_and_the_exact_network_stays(family):
    halves = tiny_halves(2)
    model = calibrated(family, halves)
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    plain = rtn.nearest(model).whole
    found = rtn.bias_corrected(plain, halves).whole
    assert plain.net is model.net
    assert set(plain.quantized_layers) == set(model.layers)
    assert found.quantizers.keys() == plain.quantizers.keys()
    assert found.exact_net is model.exact_net
    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())
    for name in model.layers:
        layer, old = found.net.get_submodule(name), model.net.get_submodule(name)
        assert torch.equal(layer.weight, old.weight)
        assert not torch.equal(layer.bias, old.bias)


def test_each_trial_is_corrected_by_its_own_half_and_the_whole_by_both():
    halves, name = tiny_halves(2), "blocks.1.mlp.fc2"
    model = calibrated("vit", halves)
    found = rtn.bias_corrected(rtn.nearest(model).whole, halves)
    layer, means = model.net.get_submodule(name), []
    for half in halves:
        seen = []
        handle = layer.register_forward_pre_hook(lambda _layer, args, seen=seen: seen.append(args[0].flatten(0, 1)))
        with torch.no_grad():
            model.net(torch.cat(list(half)))
        handle.remove()
        means.append(seen[0].mean(0))
    lost = layer.weight - channel_qparams(layer.weight).fake_quantize(layer.weight)
    by_half, whole = [layer.bias + lost @ mean for mean in means], layer.bias + lost @ (means[0] + means[1]) / 2
    assert float((by_half[0] - by_half[1]).abs().max()) > 1e-5
    pairs = [*zip(found.trials[0], by_half, strict=True), *zip(found.trials[1], by_half, strict=True)]
    for trial, expected in [*pairs, (found.whole, whole)]:
        torch.testing.assert_close(trial.net.get_submodule(name).bias, expected, rtol=1e-5, atol=1e-6)


def test_coarse_weights_lose_less_with_corrected_biases():
    halves = tiny_halves(4)
    model = calibrated("mobilenet", halves, Precision(weights=4, inputs=UNROUNDED))
    corrected, plain = rounded(model, halves, bias_correction=True), rounded(model, halves)
    assert output_db(corrected) > output_db(plain) + 0.4


def test_biases_stay_where_nobody_asked():
    halves = tiny_halves(1)
    model = calibrated("resnet", halves)
    assert rtn.candidates(model, rtn.nearest(model), halves, rtn.Config()).candidates == []
    assert rounded(model, halves).net is model.net


def test_a_correction_that_harms_is_dropped_and_said():
    """The mean of inputs that are nothing like the others' is none of theirs."""
    halves = [half_of(tiny_batches(2, seed=1)), half_of([1e3 + batch for batch in tiny_batches(2, seed=2)])]
    model = calibrated("mobilenet", halves, Precision(weights=3))
    found = rounded(model, halves, bias_correction=True)
    assert found.net is model.net
    assert found.history[-1].notes[0].startswith("dropped: bias correction: ")
    assert found.history[-1].sqnr_after_db == found.history[-1].sqnr_before_db


@pytest.mark.parametrize("count", [1, 3])
def test_statistics_of_parts_merge_to_those_of_the_whole(count):
    net, batches = tiny_model("mobilenet").net, tiny_batches(3, seed=1)
    layers = tiny_model("mobilenet").layers

    def seen(images):
        extremes, means = Extremes(), Means()
        look_at_inputs(net, layers, images, extremes, means)
        return extremes, means

    (extremes, means), parts = seen(batches), [seen(batches[:count]), seen(batches[count - 1 :])]
    merged = parts[0][0].merge(parts[1][0])
    for name in layers:
        assert torch.equal(merged.low[name], extremes.low[name])
        assert torch.equal(merged.high[name], extremes.high[name])
    if count == 1:  # nothing twice
        twice = means.merge(means)
        torch.testing.assert_close(twice.of(layers[-1]), means.of(layers[-1]))
        _, again = seen([*batches, *batches])
        torch.testing.assert_close(again.of(layers[-1]), means.of(layers[-1]))
