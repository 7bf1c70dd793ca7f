from dataclasses import replace

import pytest
import torch
from torch import nn

from calib.methods import rtn
from calib.network.layer_rows import Extremes, Means, look_at_inputs
from calib.network.qdq import quantized_net
from calib.precision import UNROUNDED, Precision
from calib.quantizer import channel_qparams
from calib.scales.calibrate import Config as CalibrateConfig
from calib.scales.calibrate import calibrate
from tests.tiny import TINY, tiny_batches, tiny_model

CORRECTED = rtn.Config(bias_correction=True)


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
        change = rtn.mean_repair(layer, params, means.of("0"))
        layer.weight.copy_(params.fake_quantize(layer.weight))
        rounded = layer(x).transpose(0, 1).flatten(1).mean(1)
    # a patch sees a little less of the edges than the channel's mean does
    tolerance = 0.05 * float((rounded - exact).abs().max())
    assert tolerance > 1e-4
    torch.testing.assert_close(rounded + change, exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", sorted(TINY))
def test_biases_of_every_family_follow_and_the_exact_network_stays(family, monkeypatch):
    folds = [tiny_batches(2, seed=1), tiny_batches(2, seed=2)]
    model = calibrate(tiny_model(family), folds, CalibrateConfig("max"))
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    monkeypatch.setattr("calib.methods.rtn.sqnr_db", lambda *_, **__: [1.0, 2.0])
    found = rtn.reduce_error(model, folds, CORRECTED)
    plain = rtn.reduce_error(model, folds, rtn.Config())
    assert found.quantizers.keys() == plain.quantizers.keys()
    assert found.exact_net is model.exact_net
    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())
    for name in model.layers:
        layer, old = found.net.get_submodule(name), model.net.get_submodule(name)
        assert torch.equal(layer.weight, old.weight)
        assert not torch.equal(layer.bias, old.bias if old.bias is not None else torch.zeros(()))
    assert plain.net is model.net


def test_coarse_weights_lose_less_with_corrected_biases():
    folds = [tiny_batches(4, seed=1), tiny_batches(4, seed=2)]
    model = replace(tiny_model("mobilenet"), precision=Precision(weights=4, inputs=UNROUNDED))
    x = torch.cat(tiny_batches(4, seed=3))

    def error(config) -> float:
        coarse = rtn.reduce_error(calibrate(model, folds, CalibrateConfig("max")), folds, config)
        with torch.no_grad():
            return float((quantized_net(coarse)(x) - model.float_net(x)).pow(2).sum())

    assert error(CORRECTED) < 0.9 * error(rtn.Config())


def test_a_correction_that_harms_is_dropped_and_said():
    """The mean of inputs that are nothing like the others' is none of theirs."""
    folds = [tiny_batches(2, seed=1), [1e3 + batch for batch in tiny_batches(2, seed=2)]]
    model = calibrate(replace(tiny_model("mobilenet"), precision=Precision(weights=3)), folds, CalibrateConfig("max"))
    found = rtn.reduce_error(model, folds, CORRECTED)
    assert found.net is model.net
    assert "dropped" in found.history[-1].notes[-1]
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
