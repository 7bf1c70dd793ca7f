"""Grids of weights in groups, against numpy."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from calib.errors import UserError
from calib.grids import WeightGroups, weight_grid
from calib.methods import rtn
from calib.network.fold import fold_affine
from calib.network.qdq import SimulatedLayer, quantized_net
from calib.precision import Precision
from calib.quantizer import channel_qparams
from calib.scales import equalise
from calib.scales.calibrate import Config, calibrate
from deploy.bridge.export import export_float
from deploy.recipe import load_recipe, recipe_from_tables
from tests.tiny import SIZE, calibrated, tiny_batches, tiny_halves, tiny_model

SHAPES = ((5, 10), (3, 8), (4, 7, 3, 3), (6, 1, 3, 3))


def weights(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.3


def by_hand(weight, bits, group):
    """Every group of every output channel on 2^bits levels from its least to its largest value, 0 among them."""
    rounded = np.empty_like(weight)
    for row, values in zip(rounded, weight, strict=True):
        for start in range(0, len(values), group):
            part = values[start : start + group]
            low, high = min(part.min(), 0), max(part.max(), 0)
            scale = np.float32(np.float16((high - low) / (2**bits - 1)))
            zero = -np.round(low / scale)
            row[start : start + group] = (np.clip(np.round(part / scale) + zero, 0, 2**bits - 1) - zero) * scale
    return rounded


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("bits", "group"), [(4, 4), (3, 2), (4, 128)])
def test_each_group_of_input_channels_has_its_own_range(shape, bits, group):
    weight = weights(shape)
    found = weight_grid(weight, bits, group).fake_quantize(weight)
    assert found.shape == weight.shape
    np.testing.assert_allclose(found.numpy(), by_hand(weight.numpy(), bits, group), rtol=0, atol=1e-6)


def test_a_large_weight_costs_its_own_group_alone():
    weight = weights((2, 12))
    weight[:, 5] = 50.0
    lost = (weight_grid(weight, 4, 4).fake_quantize(weight) - weight).abs()
    assert float(lost[:, 4:8].max()) > 0.5
    assert float(lost[:, [0, 1, 2, 3, 8, 9, 10, 11]].max()) < 0.25


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_stays_and_zero_points_fit_into_the_bits(bits):
    weight = torch.cat([weights((4, 8)) + shift for shift in (-5, 0, 5)])
    weight[:, 2], weight[1] = 0.0, 0.0
    grid = weight_grid(weight, bits, 4)
    assert isinstance(grid, WeightGroups)
    assert (grid.fake_quantize(weight)[weight == 0] == 0).all()
    assert grid.params.zero_point.abs().max() <= 2 ** (bits - 1)


def test_clipping_ends_at_the_range_of_the_group():
    weight = torch.tensor([[-1.0, 2.0, 0.0, 30.0]])
    clipped = weight_grid(weight, 8, 2).clip(torch.full_like(weight, 100.0))
    torch.testing.assert_close(clipped, torch.tensor([[2.0, 2.0, 30.0, 30.0]]), rtol=0.01, atol=0)


def test_without_a_group_whole_channels_share_a_scale():
    weight = weights((4, 6))
    found, expected = weight_grid(weight, 4), channel_qparams(weight, 4)
    assert torch.equal(found.scale, expected.scale)
    assert (found.axis, found.narrow, found.bits) == (0, True, 4)


@pytest.mark.parametrize("family", ["vit", "mobilenet"])
@pytest.mark.parametrize("inputs", [8, 32])
def test_the_simulation_has_the_weights_of_their_groups(family, inputs):
    model = rtn.nearest(calibrated(family, tiny_halves(1), Precision(4, inputs, weight_group=16))).whole
    net = quantized_net(model)
    for name in model.layers:
        layer, exact = net.get_submodule(name), model.net.get_submodule(name)
        assert isinstance(layer, SimulatedLayer)
        expected = by_hand(exact.weight.numpy(), 4, 16)
        np.testing.assert_allclose(layer.layer.weight.numpy(), expected, rtol=0, atol=1e-5)


def test_biases_make_up_for_the_mean_of_what_groups_lose():
    halves = tiny_halves(2)
    model = calibrated("vit", halves, Precision(3, 32, weight_group=16))
    found, name = rtn.bias_corrected(rtn.nearest(model).whole, halves).whole, "blocks.1.mlp.fc2"
    layer = model.net.get_submodule(name)
    lost = layer.weight - torch.from_numpy(by_hand(layer.weight.numpy(), 3, 16))
    mean = rtn.mean_inputs(model, halves)[-1][name]
    change = found.net.get_submodule(name).bias - layer.bias
    torch.testing.assert_close(change, lost @ mean, rtol=1e-4, atol=1e-6)


def test_no_graph_holds_groups_and_the_refusal_names_the_weight():
    model = rtn.nearest(calibrated("vit", tiny_halves(1), Precision(4, 8, weight_group=16))).whole
    with pytest.raises(
        UserError, match=r"quantizer 'blocks\.0\.attn\.qkv:weight' has a WeightGroups grid: it is simul"
    ):
        export_float(quantized_net(model), (SIZE, SIZE))


def test_a_recipe_with_groups_is_read_and_refused_for_engines(tmp_path):
    path = tmp_path / "groups.toml"
    path.write_text("[precision]\nweights = 4\nweight_group = 128\n")
    recipe = load_recipe(str(path))
    assert recipe.precision == Precision(4, weight_group=128)
    assert load_recipe(str(path)).to_toml().count("weight_group = 128") == 1
    with pytest.raises(UserError, match=r"simulated only: .*weight_group = 128; expected .*weight_group = None"):
        recipe.for_engine()
    for bad, message in (("0", "weight_group 0 is not a number"), ('"all"', "option 'weight_group' is 'all'")):
        path.write_text(f"[precision]\nweight_group = {bad}\n")
        with pytest.raises(UserError, match=message):
            load_recipe(str(path))


def test_channel_scales_are_chosen_for_whole_channels_alone():
    halves = tiny_halves(1)
    model = replace(tiny_model("vit"), precision=Precision(4, 8, weight_group=16))
    model = fold_affine(model, tiny_batches(1)[0][:1])
    with pytest.raises(UserError, match=r"weight_group = 16 is for .* without \[equalise\]"):
        equalise.equalise(model, halves, equalise.Config())
    assert calibrate(model, halves, Config("max")).quantizers


def test_a_recipe_reads_groups_from_its_tables():
    assert recipe_from_tables("r", {"precision": {"weight_group": 64}}, "r").precision.weight_group == 64
