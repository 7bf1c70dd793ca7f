"""RepQ-ViT's reparametrisation: the paper's formulas, evaluated by numpy on a small transformer."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from calib.errors import UserError
from calib.hooks import input_hooks
from calib.precision import Precision
from calib.quantizer import QParams
from calib.scales.calibrate import Config as CalibrateConfig
from calib.scales.calibrate import calibrate
from calib.scales.equalise import Config, equalise
from calib.scales.repq import channel_ranges, reparametrised
from tests.tiny import tiny_batches, tiny_halves, tiny_model

HALVES = tiny_halves(2)
PAIRS = [
    (f"blocks.{i}.{norm}", f"blocks.{i}.{layer}")
    for i in (0, 1)
    for norm, layer in (("norm1", "attn.qkv"), ("norm2", "mlp.fc1"))
]
REPQ = Config(rule="repq")


def uneven(bits: int):
    """A transformer whose LayerNorms give channels of very different ranges, far from 0."""
    model = tiny_model("vit")
    with torch.no_grad():
        for norm, _ in PAIRS:
            module = model.net.get_submodule(norm)
            module.weight.mul_(torch.logspace(-0.7, 0.7, 48))
            module.bias.add_(torch.linspace(-2, 2, 48))
    return replace(model, precision=Precision(8, bits, zero_points=True))


def inputs_of(net, layers) -> dict[str, torch.Tensor]:
    found = {}
    with input_hooks(net, layers, lambda name, _layer, x: found.update({name: x.flatten(0, -2)})), torch.no_grad():
        net(torch.cat([*HALVES[0], *HALVES[1]]))
    return found


def fp16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float64)


def channel_parameters_by_hand(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(s, z) per channel of x (T, C): the percentile with the least error, channel by channel, unsigned integers."""
    scales, zeros = [], []
    for channel in x.T:
        tried = []
        for p in (0.999, 0.9999, 0.99999):
            low, high = np.quantile(channel, 1 - p), np.quantile(channel, p)
            s = fp16((high - low) / (2**bits - 1))
            z = np.round(-low / s)
            rounded = s * (np.clip(np.round(channel / s) + z, 0, 2**bits - 1) - z)
            tried.append((((rounded - channel) ** 2).mean(), s, z))
        _, s, z = min(tried)
        scales.append(s)
        zeros.append(z)
    return np.array(scales), np.array(zeros)


@pytest.mark.parametrize("bits", [4, 6])
def test_it_is_what_the_papers_formulas_give(bits):
    model = uneven(bits)
    moved = equalise(model, HALVES, REPQ)
    read = inputs_of(model.net, [layer for _, layer in PAIRS])
    for norm_name, layer_name in PAIRS:
        s, z = channel_parameters_by_hand(read[layer_name].double().numpy(), bits)
        s_mean, z_mean = fp16(s.mean()), np.round(z.mean())
        r, t = s / s_mean, -(z - z_mean) * s_mean
        old = {name: value.double().numpy() for name, value in model.net.state_dict().items()}
        new = moved.net.state_dict()
        gamma, beta = old[f"{norm_name}.weight"], old[f"{norm_name}.bias"]
        weight = old[f"{layer_name}.weight"] * r
        expected = {
            f"{norm_name}.weight": gamma / r,
            f"{norm_name}.bias": beta / r - t,
            f"{layer_name}.weight": weight,
            f"{layer_name}.bias": old[f"{layer_name}.bias"] + weight @ t,
        }
        for name, value in expected.items():
            error = np.abs(new[name].numpy() - value).max() / np.abs(value).max()
            assert error < 1e-5, (name, error)
        grid = moved.qparams(f"{layer_name}:input")
        assert float(grid.scale) == pytest.approx(s_mean, rel=1e-6)
        assert float(grid.zero_point) == z_mean - 2 ** (bits - 1)
        assert (grid.bits, grid.axis) == (bits, None)


def test_the_float_function_is_unchanged():
    model = uneven(4)
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    moved = equalise(model, HALVES, REPQ)
    x = tiny_batches(1, seed=3)[0]
    with torch.no_grad():
        exact = model.net.double()(x.double())
        found = moved.net.double()(x.double())
    assert float((found - exact).norm() / exact.norm()) < 1e-5
    assert all(torch.equal(value.float(), before[name]) for name, value in model.net.state_dict().items())
    assert not torch.allclose(moved.net.state_dict()["blocks.0.norm1.weight"].float(), before["blocks.0.norm1.weight"])


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_rounding_the_tensor_afterwards_is_rounding_every_channel_before(bits):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 7, generator=generator).double() * torch.logspace(-1, 1, 7) + torch.linspace(-3, 3, 7)
    low, high = (bound.float() for bound in channel_ranges(x, bits))
    found = reparametrised(low, high, bits)
    scale = ((high - low) / (2**bits - 1)).half().float()
    zero_point = -(2 ** (bits - 1)) - torch.round(low / scale)
    per_channel = QParams(scale, axis=1, bits=bits, zero_point=zero_point).fake_quantize(x)
    after = found.grid.fake_quantize((x - found.shift) / found.scale) * found.scale + found.shift
    torch.testing.assert_close(after, per_channel, rtol=1e-5, atol=1e-5)


def test_channels_without_a_range_are_left_finite_and_exact():
    low, high = torch.tensor([-1.0, 2.0, 0.0]), torch.tensor([1.0, 2.0, 0.0])
    found = reparametrised(low, high, 4)
    assert float(found.scale.min()) > 1e-3
    x = torch.tensor([[0.5, 2.0, 0.0]])
    after = found.grid.fake_quantize((x - found.shift) / found.scale) * found.scale + found.shift
    torch.testing.assert_close(after[0, 1:], x[0, 1:], rtol=5e-3, atol=1e-6)


def test_calibrate_keeps_its_grids_and_gives_the_others_theirs():
    moved = equalise(uneven(4), HALVES, REPQ)
    found = calibrate(moved, HALVES, CalibrateConfig())
    assert all(found.quantizers[quantizer] is grid for quantizer, grid in moved.quantizers.items())
    assert {f"{name}:input" for name in found.layers} == set(found.quantizers)
    assert len(moved.quantizers) == 4
    assert moved.history[-1].notes == ("4 LayerNorms reparametrised as in RepQ-ViT, on 16 images",)


def test_it_rounds_uneven_channels_better():
    model = uneven(4)
    x = tiny_batches(1, seed=3)[0]

    def error(candidate) -> float:
        grids = calibrate(candidate, HALVES, CalibrateConfig()).quantizers
        names = [layer for _, layer in PAIRS]
        with (
            input_hooks(candidate.net, names, lambda name, _l, x: grids[f"{name}:input"].fake_quantize(x)),
            torch.no_grad(),
        ):
            rounded = candidate.net(x)
        with torch.no_grad():
            return float((rounded - model.net(x)).square().sum())

    assert error(equalise(model, HALVES, REPQ)) < 0.5 * error(model)


def test_it_needs_zero_points_and_known_rules():
    for precision in (Precision(8, 4), Precision(4, 32, zero_points=True)):
        with pytest.raises(UserError, match="rule 'repq' is for inputs that round with zero points"):
            equalise(replace(tiny_model("vit"), precision=precision), HALVES, REPQ)
    with pytest.raises(ValueError, match="rule 'smooth' is not one of search, repq"):
        Config(rule="smooth")
