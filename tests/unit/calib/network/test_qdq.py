import pytest
import torch
from torch import nn

from calib.methods import rtn
from calib.network.qdq import QuantConv2d, QuantLinear, quantized_net
from calib.quantizer import channel_qparams, qparams_from_amax
from calib.scales.calibrate import Config, calibrate, observed_inputs
from tests.tiny import TINY, tiny_batches, tiny_halves, tiny_model


def input_params(x):
    return qparams_from_amax(x.abs().max())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 16), (2, 7, 16)], ids=["2-D", "3-D"])
def test_quant_linear_is_fake_quantization_of_input_and_weight(bias, shape):
    linear, x = nn.Linear(16, 8, bias=bias), torch.randn(shape)
    weight_params = channel_qparams(linear.weight)
    expected = nn.functional.linear(
        input_params(x).fake_quantize(x), weight_params.fake_quantize(linear.weight), linear.bias
    )
    found = QuantLinear(linear, input_params(x), weight_params)(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"groups": 4}, {"stride": 2, "padding": 1}, {"dilation": 2}],
    ids=lambda o: str(o) or "plain",
)
def test_quant_conv_is_fake_quantization_of_input_and_weight(options):
    conv, x = nn.Conv2d(4, 8, 3, **options), torch.randn(2, 4, 9, 9)
    weight_params = channel_qparams(conv.weight)
    reference = nn.Conv2d(4, 8, 3, **options)
    reference.weight.data, reference.bias.data = (
        weight_params.fake_quantize(conv.weight.detach()),
        conv.bias.data,
    )
    found = QuantConv2d(conv, input_params(x), weight_params)(x)
    torch.testing.assert_close(found, reference(input_params(x).fake_quantize(x)), rtol=1e-5, atol=1e-5)


def test_the_largest_weight_of_each_channel_becomes_127():
    weight = torch.randn(6, 10)
    quantized = QuantLinear(nn.Linear(10, 6), input_params(torch.ones(1)), channel_qparams(weight)).integers
    assert quantized.dtype == torch.int8
    linear = nn.Linear(10, 6)
    linear.weight.data = weight
    quantized = QuantLinear(linear, input_params(torch.ones(1)), channel_qparams(weight)).integers
    assert quantized.shape == (10, 6)
    assert quantized.abs().amax(0).tolist() == [127] * 6


@pytest.mark.parametrize(
    ("layer", "kind"), [(nn.Linear(6, 10), QuantLinear), (nn.Conv2d(4, 8, 3, groups=2), QuantConv2d)]
)
def test_code_that_reads_the_weight_of_a_layer_finds_it_in_float(layer, kind):
    params = channel_qparams(layer.weight)
    found = kind(layer, input_params(torch.ones(1)), params)
    torch.testing.assert_close(found.weight, params.fake_quantize(layer.weight.detach()))


@pytest.mark.parametrize("family", sorted(TINY))
def test_exactly_the_layers_of_the_family_are_quantized_and_the_model_is_untouched(family):
    model = tiny_model(family)
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    quantized = rtn.nearest(calibrate(model, tiny_halves(2), Config("max"))).whole
    net = quantized_net(quantized)
    found = {name for name, m in net.named_modules() if isinstance(m, QuantLinear | QuantConv2d)}
    assert found == set(model.layers)
    assert found
    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.net.modules())


def test_observation_sees_the_inputs_of_a_layer():
    net = nn.Sequential(nn.ReLU(), nn.Linear(3, 3))
    with observed_inputs(net, ["1"]) as seen:
        net(torch.tensor([[-5.0, 2.0, 1.0]]))
    assert seen["1"].amax == 2.0


def test_the_percentile_of_the_structure_is_used_unless_the_recipe_says_otherwise():
    model = tiny_model("vit")
    assert (
        calibrate(model, [tiny_batches(1)], Config("percentile")).history[-1].config["percentile"]
        == model.structure.percentile
    )
    assert calibrate(model, [tiny_batches(1)], Config("percentile", 90.0)).history[-1].config["percentile"] == 90.0


@pytest.mark.parametrize("bad", [{"observer": "maxx"}, {"percentile": 101.0}])
def test_impossible_options_are_refused(bad):
    with pytest.raises(ValueError, match="is not"):
        Config(**bad)
