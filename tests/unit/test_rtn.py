from dataclasses import replace

import pytest
import torch
from torch import nn

from calib.calibrate import Config as CalibrateConfig
from calib.calibrate import calibrate
from calib.layer_rows import channel_statistics
from calib.methods import rtn
from calib.precision import UNROUNDED, Precision
from calib.qdq import quantized_net
from calib.quantizer import channel_qparams
from tests.tiny import TINY, tiny_batches, tiny_model

CORRECTED = rtn.Config(bias_correction=True)


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 4), nn.Conv2d(6, 4, 3), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1, groups=2)], ids=str
)
def test_the_mean_output_is_that_of_the_exact_weight(layer):
    torch.manual_seed(0)
    x = torch.randn(400, 6) + 3 if isinstance(layer, nn.Linear) else torch.randn(40, 6, 12, 12) + 3
    params = channel_qparams(layer.weight, bits=3)
    mean = channel_statistics(nn.Sequential(layer), ["0"], [x]).mean("0")
    with torch.no_grad():
        exact = layer(x).transpose(0, 1).flatten(1).mean(1)
        change = rtn.mean_repair(layer, params, mean)
        layer.weight.copy_(params.fake_quantize(layer.weight))
        rounded = layer(x).transpose(0, 1).flatten(1).mean(1)
    # a patch sees a little less of the edges than the channel's mean does
    tolerance = 0.05 * float((rounded - exact).abs().max())
    assert tolerance > 1e-4
    torch.testing.assert_close(rounded + change, exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", sorted(TINY))
def test_biases_of_every_family_follow_and_the_exact_network_stays(family):
    folds = [tiny_batches(2, seed=1), tiny_batches(2, seed=2)]
    model = calibrate(tiny_model(family), folds, CalibrateConfig("max"))
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    found = rtn.reduce_error(model, folds, CORRECTED)
    plain = rtn.reduce_error(model, folds, rtn.Config())
    assert found.sites.keys() == plain.sites.keys()
    assert found.exact_net is model.exact_net
    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())
    for name in model.layers:
        layer, old = found.net.get_submodule(name), model.net.get_submodule(name)
        assert torch.equal(layer.weight, old.weight)
        assert not torch.equal(layer.bias, old.bias if old.bias is not None else torch.zeros(()))
    assert plain.net is model.net


@pytest.mark.parametrize("family", ["mobilenet", "vit"])
def test_coarse_weights_lose_less_with_corrected_biases(family):
    folds = [tiny_batches(4, seed=1), tiny_batches(4, seed=2)]
    model = replace(tiny_model(family), precision=Precision(weights=4, inputs=UNROUNDED))
    x = torch.cat(tiny_batches(4, seed=3))

    def error(config) -> float:
        coarse = rtn.reduce_error(calibrate(model, folds, CalibrateConfig("max")), folds, config)
        with torch.no_grad():
            return float((quantized_net(coarse)(x) - model.float_net(x)).pow(2).sum())

    assert error(CORRECTED) < 0.9 * error(rtn.Config())
