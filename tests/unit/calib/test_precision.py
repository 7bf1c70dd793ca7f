"""Networks of fewer bits: what each layer rounds to, and that no engine is promised for it."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from calib.errors import UserError
from calib.grids import Unrounded, input_grid, straight_through, why_not_int8
from calib.hooks import input_hooks
from calib.judge.held_out import held_out_errors
from calib.methods import erq, rtn
from calib.network.fold import fold_affine
from calib.network.qdq import QuantLinear, quantized_net
from calib.precision import Precision
from calib.quantizer import QParams, qparams_from_amax, qparams_from_range, quantize
from calib.scales.calibrate import Config, calibrate
from deploy.bridge.export import export_float
from deploy.recipe import load_recipe
from tests.tiny import SIZE, half_of, tiny_batches, tiny_model

X = torch.linspace(-3, 3, 1001)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_grid_has_all_integers_of_its_bits(bits):
    params = qparams_from_amax(torch.tensor(2.0), bits=bits)
    assert sorted(set(quantize(X, params).tolist())) == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))


@pytest.mark.parametrize(("low", "high"), [(-1.0, 2.0), (0.0, 2.5), (1.0, 3.0), (-3.0, -0.5)])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_zero_point_spends_all_levels_on_the_range(low, high, bits):
    params = qparams_from_range(torch.tensor(low), torch.tensor(high), bits=bits)
    found = params.fake_quantize(X)
    step = float(params.scale)
    levels = round(low / step) * step + step * np.arange(2**bits)
    nearest = levels[np.abs(X.numpy()[:, None] - levels).argmin(1)]
    distance = np.abs(X.numpy()[:, None] - levels).min(1)
    # a tie, where two levels are equally near, may go either way
    assert np.all(np.abs(np.abs(found.numpy() - X.numpy()) - distance) < 1e-5 * step + 1e-6)
    assert np.isclose(found, nearest, atol=1e-5).mean() > 0.95
    assert len(set(quantize(X, params).tolist())) == 2**bits


def test_rounding_passes_gradients_inside_the_range_and_stops_them_outside():
    params = qparams_from_range(torch.tensor(-1.0), torch.tensor(2.0), bits=4)
    x = X.clone().requires_grad_()
    straight_through(x, params).sum().backward()
    inside = (x > -0.99) & (x < 1.99)
    outside = (x < -1.01) | (x > 2.01)
    assert (x.grad[inside] == 1).all()
    assert (x.grad[outside] == 0).all()


def test_only_eight_bits_without_a_zero_point_and_one_scale_have_a_kernel():
    assert why_not_int8(qparams_from_amax(torch.tensor(1.0))) is None
    assert why_not_int8(qparams_from_amax(torch.tensor(1.0), bits=6)) == "6 bits"
    assert why_not_int8(qparams_from_range(torch.tensor(0.0), torch.tensor(1.0))) == "a zero point"
    assert why_not_int8(QParams(torch.ones(3), axis=1)) == "a scale per channel"
    assert why_not_int8(Unrounded()) == "a Unrounded grid"
    assert isinstance(input_grid(1.0, 32), Unrounded)


def calibrated(family: str, precision: Precision):
    batches = tiny_batches(8)
    model = replace(tiny_model(family), precision=precision)
    halves = [half_of(batches[:4]), half_of(batches[4:])]
    return calibrate(fold_affine(model, batches[0][:1]), halves, Config("mse")), halves


def by_hand(model, images):
    """The network with every weight and input rounded by numpy."""

    def nearest(x, params):
        q = np.clip(np.round(x / params.scale.numpy().reshape(-1, *[1] * (x.ndim - 1))), params.low, params.high)
        return q * params.scale.numpy().reshape(-1, *[1] * (x.ndim - 1))

    net = copy.deepcopy(model.net)
    for name in model.layers:
        weight = net.get_submodule(name).weight
        weight.data = torch.from_numpy(nearest(weight.data.numpy(), model.quantizers[f"{name}:weight"])).float()

    def hook(name, _layer, x):
        grid = model.quantizers[f"{name}:input"]
        if isinstance(grid, Unrounded):
            return x
        return torch.from_numpy(nearest(x.numpy().reshape(1, -1), grid)).float().reshape(x.shape)

    with input_hooks(net, model.layers, hook), torch.no_grad():
        return net(images)


@pytest.mark.parametrize("family", ["vit", "mobilenet"])
@pytest.mark.parametrize(
    "precision", [Precision(4, 4), Precision(3, 4, first_last=8), Precision(4, 8), Precision(4, 32, 8)]
)
def test_the_simulation_rounds_as_by_hand(family, precision):
    model, halves = calibrated(family, precision)
    model = rtn.nearest(model).whole
    images = next(iter(halves[1]))
    with torch.no_grad():
        found = quantized_net(model)(images)
    torch.testing.assert_close(found, by_hand(model, images), rtol=1e-3, atol=1e-3 * float(found.abs().max()))
    first_last = {name for name in model.layers if model.structure.why_float(name) is not None}
    assert bool(first_last) == bool(precision.first_last)
    assert all(model.quantizers[f"{name}:weight"].bits == precision.first_last for name in first_last)


@pytest.mark.parametrize("bits", [3, 4])
def test_erq_at_few_bits_stays_on_its_grid_and_beats_rounding_to_nearest(bits):
    model, halves = calibrated("vit", Precision(bits, bits))
    plain = rtn.nearest(model)
    candidate = erq.candidates(model, plain, halves, erq.Config()).candidates[-1]
    found = candidate.whole
    changed = [name for name in found.layers if not torch.equal(
        found.net.get_submodule(name).weight, plain.whole.net.get_submodule(name).weight)]  # fmt: skip
    assert len(changed) > 4
    for name in changed:
        params, weight = found.qparams(f"{name}:weight"), found.net.get_submodule(name).weight
        assert params.bits == bits
        assert int(quantize(weight, params).abs().max()) <= 2 ** (bits - 1) - 1
        assert torch.equal(params.fake_quantize(weight), weight)
    assert held_out_errors([[plain, candidate]] * 2, halves).gain(0, 1).mean_db > 0


def test_few_bits_of_weights_run_as_int8_and_fewer_of_inputs_are_refused_by_name():
    model, _ = calibrated("vit", Precision(4, 8))
    net = quantized_net(rtn.nearest(model).whole)
    layer = net.get_submodule("blocks.0.attn.qkv")
    assert isinstance(layer, QuantLinear)
    assert int(layer.integers.abs().max()) == 7
    model, _ = calibrated("vit", Precision(8, 6))
    with pytest.raises(UserError, match=r"'blocks\.0\.attn\.qkv:input' has 6 bits"):
        export_float(quantized_net(rtn.nearest(model).whole), (SIZE, SIZE))


def test_a_simulated_recipe_is_refused_before_any_work(tmp_path):
    path = tmp_path / "low.toml"
    path.write_text("[precision]\nweights = 4\ninputs = 4\n")
    recipe = load_recipe(str(path))
    assert recipe.precision == Precision(4, 4)
    with pytest.raises(UserError, match="simulated only"):
        recipe.for_engine()
    path.write_text("[precision]\nweights = 4\n")
    assert load_recipe(str(path)).for_engine().precision.weights == 4
    path.write_text("[precision]\nweights = 1\n")
    with pytest.raises(UserError, match="weights 1 is not one of 2, 3"):
        load_recipe(str(path))


def test_layers_of_the_ends_are_those_the_engine_leaves_in_float():
    model = tiny_model("vit")
    assert "head" in model.float_layers
    assert set(replace(model, precision=Precision(first_last=8)).layers) == {
        name for name, module in model.net.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }
