"""Attention at few bits: what its four factors round to, against the attention written out by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from calib.attention.simulated import calibrate_attention, factor_grid
from calib.errors import UserError
from calib.grids import LogSqrt2, Unrounded
from calib.methods import rtn
from calib.network.qdq import quantized_net
from calib.precision import Precision
from calib.quant_model import ATTENTION_ROLES
from calib.scales.calibrate import Config, calibrate
from calib.statistics.signed_ranges import SignedHistogram
from deploy.bridge.export import export_float
from deploy.recipe import load_recipe
from tests.tiny import SIZE, tiny_halves, tiny_model

HALVES = tiny_halves(2)


def simulated(precision: Precision):
    return calibrate_attention(replace(tiny_model("vit"), precision=precision), HALVES)


def uniform(x: np.ndarray, grid) -> np.ndarray:
    scale, zero = float(grid.scale), 0 if grid.zero_point is None else float(grid.zero_point)
    return scale * (np.clip(np.round(x / scale) + zero, grid.low, grid.high) - zero)


def log_sqrt2(x: np.ndarray, grid) -> np.ndarray:
    """RepQ-ViT's code, line by line."""
    k = np.round(-2 * np.log2(x / grid.scale))
    kept = np.clip(k, 0, 2**grid.bits - 1)
    return np.where(k >= 2**grid.bits, 0, 2.0 ** -np.ceil(kept / 2) * (1 + kept % 2 * (np.sqrt(2) - 1)) * grid.scale)


def twin(x: np.ndarray, grid) -> np.ndarray:
    """The nearest of each half's levels, written out."""
    below, above = (float(half.scale) * np.arange(2**half.bits) for half in (grid.below, grid.above))
    assert below[-1] == pytest.approx(grid.split, rel=1e-3)
    assert above[-1] == pytest.approx(1, rel=1e-3)
    nearest_below, nearest_above = (half[np.abs(x[..., None] - half).argmin(-1)] for half in (below, above))
    return np.where(x < grid.split, nearest_below, nearest_above)


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize(("kind", "softmax"), [("uniform", uniform), ("log_sqrt2", log_sqrt2), ("twin", twin)])
def test_the_four_factors_round_as_by_hand(kind, softmax, zero_points):
    model = simulated(Precision(8, 4, zero_points=zero_points, attention=kind))
    attention = quantized_net(model).blocks[0].attn
    grids = [model.quantizers[f"blocks.0.attn:{role}"] for role in ATTENTION_ROLES]
    x = torch.randn(2, 17, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        packed = attention.qkv(x).numpy().astype(np.float64)
        query, key, value = packed.reshape(2, 17, 3, 3, 16).transpose(2, 0, 3, 1, 4)
        query, key, value = (
            uniform(query / 2, grids[0]),
            uniform(key / 2, grids[1]),
            uniform(value, grids[3]),
        )  # 16^-1/4
        weights = np.exp(query @ key.swapaxes(-2, -1))
        weights = softmax(weights / weights.sum(-1, keepdims=True), grids[2])
        mixed = torch.from_numpy((weights @ value).swapaxes(1, 2).reshape(2, 17, 48)).float()
        found, expected = attention(x), attention.proj(mixed)
    # a tie may round the other way: few elements may differ, and those by no more than a step's worth
    differs = (found - expected).abs() > 1e-4 * expected.abs().max()
    assert differs.float().mean() < 0.01


@pytest.mark.parametrize("zero_points", [False, True])
def test_every_factor_has_the_bits_of_inputs_and_a_range_that_fits(zero_points):
    model = simulated(Precision(8, 5, zero_points=zero_points, attention="uniform"))
    assert model.int8_attention == ("blocks.0.attn", "blocks.1.attn")
    for quantizer, grid in model.quantizers.items():
        assert grid.bits == 5
        assert (grid.zero_point is not None) == zero_points, quantizer
    softmax = model.qparams("blocks.0.attn:softmax")
    assert float(softmax.scale) * softmax.high <= 1.01 or zero_points
    if zero_points:  # nothing is spent on negative weights, which softmax never gives
        assert float(softmax.fake_quantize(torch.tensor(-1.0))) > -0.5 * float(softmax.scale)


def test_softmax_grids_lose_least_among_those_tried():
    model = simulated(Precision(8, 4, zero_points=True, attention="log_sqrt2"))
    grid = model.quantizers["blocks.1.attn:softmax"]
    assert isinstance(grid, LogSqrt2)
    assert 0.01 < grid.scale <= 1.0
    seen = []
    attention = model.net.blocks[1].attn
    handle = attention.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model.net(torch.cat([*HALVES[0], *HALVES[1]]))
        handle.remove()
        query, key, _ = attention.qkv(seen[0]).reshape(16, 17, 3, 3, 16).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(query @ key.transpose(-2, -1) / 4, -1)
    errors = [
        float((LogSqrt2(float(np.quantile(weights.numpy(), p)), 4).fake_quantize(weights) - weights).square().mean())
        for p in (0.999, 0.9999, 0.99999)
    ]
    assert float((grid.fake_quantize(weights) - weights).square().mean()) == pytest.approx(min(errors), rel=0.02)


def test_rare_weights_of_softmax_are_not_clipped_where_they_carry_the_signal():
    weights = torch.cat(
        [0.02 * torch.rand(100_000, generator=torch.Generator().manual_seed(0)), torch.full((50,), 0.9)]
    )
    histogram = SignedHistogram()
    histogram.update(weights)  # the 99.9th percentile is 0.02, the 99.99th 0.9
    grid = factor_grid("softmax", histogram, Precision(inputs=4, attention="log_sqrt2"))
    assert isinstance(grid, LogSqrt2)
    assert grid.scale == pytest.approx(0.9, rel=1e-6)


def test_more_bits_bring_attention_nearer_to_float():
    x = next(iter(HALVES[0]))

    def error(precision: Precision) -> float:
        model = simulated(precision)
        with torch.no_grad():
            return float((quantized_net(model)(x) - model.net(x)).square().sum())

    errors = [error(Precision(8, bits, zero_points=True, attention="uniform")) for bits in (3, 5, 8)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert error(Precision(8, 32, attention="uniform")) < 1e-4 * errors[2]


def test_inputs_of_32_bits_leave_attention_as_it_is():
    quantizers = simulated(Precision(4, 32, attention="log_sqrt2")).quantizers
    assert all(isinstance(grid, Unrounded) for grid in quantizers.values())


def test_a_network_without_attention_has_none_to_simulate():
    model = calibrate_attention(replace(tiny_model("resnet"), precision=Precision(attention="uniform")), HALVES)
    assert model.quantizers == {}
    assert model.history[-1].notes == ("0 attentions simulated, softmax output uniform",)


def test_what_cannot_be_simulated_is_refused():
    model = replace(tiny_model("vit"), precision=Precision(attention="uniform"))
    model.net.blocks[1].attn.norm = nn.LayerNorm(48)
    with pytest.raises(UserError, match=r"attention 'blocks\.1\.attn' cannot be simulated: it has a gate or a norm"):
        calibrate_attention(model, HALVES)
    with pytest.raises(ValueError, match="attention 'log2' is not one of float, uniform, log_sqrt2, twin"):
        Precision(attention="log2")


def test_it_has_no_engine(tmp_path):
    model = calibrate(simulated(Precision(8, 8, attention="log_sqrt2")), HALVES, Config("max"))
    net = quantized_net(rtn.nearest(model).whole)
    with pytest.raises(UserError, match=r"'blocks\.0\.attn:softmax' has a LogSqrt2 grid"):
        export_float(net, (SIZE, SIZE))
    path = tmp_path / "paper.toml"
    for line in ('attention = "uniform"', "zero_points = true", "inputs = 6", "first_last = 8"):
        path.write_text(f"[precision]\n{line}\n")
        key, value = (part.strip().strip('"').replace("true", "True") for part in line.split("="))
        with pytest.raises(
            UserError, match=rf"{key} = {value}.*expected inputs = 8, first_last = 0, zero_points = False"
        ):
            load_recipe(str(path)).for_engine()
