"""Products written in INT8. Oracles: the product computed by hand, rounding one product alone, and the network itself."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from calib.grids import Unrounded
from calib.layerwise.int8_products import Config, int8_products, linear_layers, products
from calib.layerwise.rounding_points import FACTORS, noise_of, reach
from calib.network.qdq import QuantLinear, quantized_net, tensor_and_channel_scales
from calib.quantizer import channel_qparams, qparams_from_amax, quantize
from tests.tiny import calibrated, output_db, rounded, tiny_batches, tiny_halves

HALVES = tiny_halves()
LAYERS = [f"blocks.{index}.{layer}" for index in range(2) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


@pytest.fixture(scope="module")
def model():
    return rounded(calibrated("vit", HALVES), HALVES)


@pytest.fixture(scope="module")
def found(model):
    return products(model, LAYERS, HALVES)


def with_open_products(model, layers):
    return quantized_net(model.with_quantizers({f"{layer}:output": Unrounded() for layer in layers}))


@pytest.mark.parametrize("largest", [2.0**-9, 1.3 * 2.0**-9, 0.7, 1.0, 3.0])
def test_the_scales_of_tensor_and_channels_give_those_of_the_weight(largest):
    scales = torch.tensor([largest, largest / 3, largest / 100]).half().float()
    t, c = tensor_and_channel_scales(scales)
    assert t.shape == ()
    assert float(t) == 2.0 ** torch.log2(t).round()
    assert torch.equal(t * c, scales)
    assert float(t) == 1 if largest > 1 else 0.5 < float(c.max()) <= 1


def test_the_product_rounds_before_channel_scales_and_bias():
    torch.manual_seed(0)
    linear = nn.Linear(24, 10).requires_grad_(False)
    x, read, weight = torch.randn(5, 24), qparams_from_amax(torch.tensor(3.0)), channel_qparams(linear.weight)
    written = qparams_from_amax(torch.tensor(4.0))
    t, c = tensor_and_channel_scales(weight.scale)
    integers = quantize(x, read).double() @ quantize(linear.weight, weight).double().t()  # the INT32 sums
    product = integers * float(read.scale * t)
    step = float(written.scale)
    by_hand = (product / step).round().clamp(-128, 127) * step * c.double() + linear.bias
    open_layer = QuantLinear(linear, read, weight, nn.Identity())
    assert torch.allclose(open_layer(x), QuantLinear(linear, read, weight)(x), atol=1e-6)
    assert torch.equal(open_layer.weight, QuantLinear(linear, read, weight).weight)
    open_layer.output = nn.Module()
    open_layer.output.forward = written.fake_quantize
    apart = (open_layer(x).double() - by_hand).abs()
    assert float((apart > 1e-5).double().mean()) < 0.05, "but for ties"
    assert float(apart.max()) < 1.01 * float(written.scale * c.max())


def test_linear_layers_are_those_an_engine_quantizes(model):
    assert linear_layers(model) == LAYERS
    less = replace(model, quantizers={key: grid for key, grid in model.quantizers.items() if ".fc1:" not in key})
    assert linear_layers(less) == [name for name in LAYERS if ".fc1" not in name]


def test_products_that_do_not_round_change_nothing(model):
    images = tiny_batches(1)[0]
    with torch.no_grad():
        assert torch.allclose(with_open_products(model, LAYERS)(images), quantized_net(model)(images), atol=1e-4)


def test_the_reach_is_that_of_the_largest_product(model):
    name = LAYERS[2]
    largest, sizes = reach(with_open_products(model, [name]), {name: f"{name}.output"}, HALVES[0])
    net, seen = quantized_net(model), []
    layer = net.get_submodule(name)
    _, c = tensor_and_channel_scales(layer.weight_scale)
    layer.register_forward_hook(lambda _m, _x, y: seen.append((y - layer.bias) / c))
    with torch.no_grad():
        for batch in HALVES[0]:
            net(batch)
    assert largest[name] == pytest.approx(max(float(each.abs().max()) for each in seen), rel=1e-4)
    assert sizes == {name: seen[0][0].numel()}


def test_the_noise_foretold_is_that_of_the_output(model):
    """Where this layer alone rounds: to first order and by four projections, so within a factor of two."""
    name, images = LAYERS[2], torch.cat(tiny_batches(3, seed=5))
    model = replace(model, quantizers={key: model.quantizers[key] for key in (f"{name}:input", f"{name}:weight")})
    open_net, points = with_open_products(model, [name]), {name: f"{name}.output"}
    largest = reach(open_net, points, HALVES[0])[0]
    foretold = noise_of(open_net, points, largest, images)[name]
    for factor, noise in zip(FACTORS, foretold, strict=True):
        grid = qparams_from_amax(torch.tensor(largest[name] * factor))
        with torch.no_grad():
            net = quantized_net(model.with_quantizers({f"{name}:output": grid}))
            true = float((net(images) - open_net(images)).square().sum())
        assert true / 2 < noise / 4 < 2 * true, factor  # `output_noise` counts each of 4 projections


def test_the_cheapest_per_value_come_first(found):
    order, cost = found.order(found.together)
    per_value = [cost[name] / found.sizes[name] for name in order]
    assert sorted(order) == sorted(LAYERS)
    assert per_value == sorted(per_value)
    assert cost == {name: min(noise) for name, noise in found.together.items()}


def test_a_budget_is_spent_and_kept(model):
    chosen = int8_products(model, HALVES, Config(3.0))
    assert chosen.int8_products
    record, count = chosen.history[-1], len(chosen.int8_products)
    assert record.stage == "int8_products"
    assert record.notes[0].startswith(f"{count} of 8 matrix products in INT8: output SQNR ")
    assert output_db(model) - 3.5 <= output_db(chosen) < output_db(model)
    assert chosen.net is model.net, "weights stay"


def test_without_a_budget_the_network_is_what_it_was(model):
    chosen = int8_products(model, HALVES, Config(0.0))
    assert replace(chosen, history=()) == replace(model, history=())
    assert chosen.history[-1].notes[0].startswith("dropped, all stay in FP16: ")


def test_a_network_without_linear_layers_is_left_alone(model):
    bare = replace(model, quantizers={})
    chosen = int8_products(bare, HALVES, Config())
    assert chosen.history[-1].notes == ("no linear layer is quantized",)
    assert chosen.quantizers == {}


@pytest.mark.parametrize("loss", [-0.1, float("nan"), 1e9])
def test_a_loss_that_is_no_budget_is_refused(loss):
    with pytest.raises(ValueError, match="max_loss_db"):
        Config(loss)
