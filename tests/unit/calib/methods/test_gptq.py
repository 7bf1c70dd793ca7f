import itertools

import pytest
import torch
from torch import nn

from calib.layerwise.layer_sums import LayerSums
from calib.methods import gptq, rtn
from calib.network.rounded_layer import augmented_weight, rounded_layer
from calib.precision import Precision
from calib.quantizer import channel_qparams
from tests.tiny import calibrated, output_db, rounded, tiny_halves


def problem(columns, rows=6, groups=2, high=7, seed=0):
    """Weights, scales and the damped second moment of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(groups, 8 * columns, columns, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(groups, rows, columns, generator=generator, dtype=torch.float64)
    moment = x.mT @ x / x.shape[1] + 0.01 * torch.eye(columns, dtype=torch.float64)
    return weight, weight.abs().amax(-1) / high, moment


def loss(weight, integers, scale, moment):
    error = integers * scale[..., None] - weight
    return ((error @ moment) * error).sum(-1)


def optimal_brain_quantization(w, scale, moment, low, high):
    """One row, in the order of columns: every remaining H is inverted anew (OBQ, eq. 2 and 3 of the GPTQ paper)."""
    w, q = w.clone(), torch.zeros_like(w)
    for j in range(len(w)):
        inverse = torch.linalg.inv(moment[j:, j:])
        q[j] = torch.clamp(torch.round(w[j] / scale), low, high)
        w[j:] -= (w[j] - q[j] * scale) / inverse[0, 0] * inverse[0]
    return q


@pytest.mark.parametrize("columns", [1, 5, 17, 33])
@pytest.mark.parametrize("block", [4, 128])
def test_it_is_optimal_brain_quantization_in_the_order_of_columns(monkeypatch, columns, block):
    monkeypatch.setattr(gptq, "BLOCK", block)
    weight, scale, moment = problem(columns)
    found = gptq.round_by_columns(weight, scale, moment, -7, 7)
    for group, row in itertools.product(range(weight.shape[0]), range(weight.shape[1])):
        expected = optimal_brain_quantization(weight[group, row], scale[group, row], moment[group], -7, 7)
        assert torch.equal(found[group, row].double(), expected)


@pytest.mark.parametrize("columns", [2, 3, 4])
def test_it_lies_between_the_best_integers_and_rounding_to_nearest(columns):
    weight, scale, moment = problem(columns, rows=64, groups=1, high=1)
    choices = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=columns)), dtype=torch.float64)
    best = torch.stack([loss(weight, choice, scale, moment) for choice in choices]).amin(0)
    found = loss(weight, gptq.round_by_columns(weight, scale, moment, -1, 1).double(), scale, moment)
    nearest = loss(weight, torch.round(weight / scale[..., None]).clamp(-1, 1), scale, moment)
    assert (best <= found + 1e-12).all()
    assert found.sum() < 0.9 * nearest.sum()  # no theorem for one row


def test_uncorrelated_columns_round_to_nearest():
    weight, scale, _ = problem(9)
    moment = torch.eye(9, dtype=torch.float64).expand(2, 9, 9)
    expected = torch.round(weight / scale[..., None]).to(torch.int8)
    assert torch.equal(gptq.round_by_columns(weight, scale, moment, -7, 7), expected)


def test_a_channel_that_is_never_active_rounds_to_nearest_and_breaks_nothing():
    torch.manual_seed(0)
    layer = nn.Linear(6, 3).requires_grad_(False)
    x = torch.randn(200, 1, 6) * torch.tensor([1, 1, 0, 1, 1, 1])
    sums = LayerSums(augmented_weight(layer))
    sums.update(x, x)
    params = channel_qparams(layer.weight, 4)
    found = gptq.fit(sums, params, 0.01)
    assert torch.equal(found.integers[0, :, 2], rounded_layer(layer, params).integers[0, :, 2])
    torch.testing.assert_close(found.bias[0], layer.bias)


@pytest.mark.parametrize("family", ["vit", "mobilenet"])
def test_the_network_is_nearer_to_float_on_images_no_half_held(family):
    halves = tiny_halves(4)
    model = calibrated(family, halves, Precision(weights=4, first_last=8))
    found, plain = rounded(model, halves, "gptq"), rounded(model, halves)
    assert output_db(found) > output_db(plain) + 0.3
    assert found.history[-1].sqnr_after_db > found.history[-1].sqnr_before_db


def test_grids_and_biases_are_those_of_rounding_to_nearest_and_all_integers_fit_into_the_bits():
    halves = tiny_halves(2)
    model = calibrated("vit", halves, Precision(weights=4))
    plain = rtn.nearest(model)
    *_, every = gptq.candidates(model, plain, halves, gptq.Config()).candidates
    assert every.name == "all 8 fitted layers"
    for name in model.layers:
        layer, params = every.whole.net.get_submodule(name), plain.whole.qparams(f"{name}:weight")
        assert torch.equal(every.whole.qparams(f"{name}:weight").scale, params.scale)
        assert torch.equal(layer.bias, model.net.get_submodule(name).bias)
        steps = layer.weight.flatten(1) / params.scale[:, None]
        assert float((steps - steps.round()).abs().max()) < 1e-5
        assert float(steps.abs().max()) < 7.5


@pytest.mark.parametrize("options", [{"damping": 0.0}, {"rows": 0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        gptq.Config(**options)
