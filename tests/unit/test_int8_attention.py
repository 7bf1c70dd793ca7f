import dataclasses

import pytest
import torch

from calib.calibrate import Config as CalibrateConfig
from calib.calibrate import calibrate
from calib.equalise import apply_moves
from calib.errors import UserError
from calib.int8_attention import Config, choose, fit, lost_mass, obstacle, prepare
from calib.methods import rtn
from calib.moves import Moved
from calib.qdq import QuantAttention, quantized_net
from calib.quant_model import ATTENTION_ROLES
from calib.quantizer import qparams_from_amax
from tests.tiny import tiny_batches, tiny_model

FOLDS = [tiny_batches(2, seed=1), tiny_batches(2, seed=2)]


def rounded(config: Config):
    model = calibrate(prepare(tiny_model("vit"), FOLDS, config), FOLDS, CalibrateConfig("max"))
    return rtn.reduce_error(model, FOLDS, rtn.Config())


def random_attention(seed: int = 0):
    """Weights (B, H, N, N) over many tokens, none of them large, and values (B, H, N, D) that have something in common."""
    torch.manual_seed(seed)
    return torch.softmax(torch.randn(2, 3, 40, 40), dim=-1), torch.randn(2, 3, 40, 5) + 4 * torch.randn(1, 3, 1, 5)


@pytest.mark.parametrize("bias", [True, False])
def test_the_shift_keeps_the_function_and_takes_the_values_down(bias):
    model = tiny_model("vit")
    model.net.double()
    attention = model.net.blocks[0].attn
    if not bias:
        attention.qkv.bias = None
    x = torch.randn(2, 17, 48, dtype=torch.float64)
    with torch.no_grad():
        mean = attention.qkv(x)[..., -48:].mean((0, 1))
        shift = Moved("blocks.0.attn.qkv", "blocks.0.attn.proj", torch.ones(48).double(), mean)
        moved = apply_moves(model, [shift]).net.blocks[0].attn
        torch.testing.assert_close(moved(x), attention(x), rtol=1e-10, atol=1e-10)
        assert float(moved.qkv(x)[..., -48:].mean((0, 1)).abs().max()) < 1e-12


def test_the_shift_is_the_least_squares_one():
    weights, value = random_attention()
    params = qparams_from_amax(torch.tensor(1.0))
    found = lost_mass(weights, value, params)
    lost = (weights - params.fake_quantize(weights)).double()
    for head in range(3):
        for channel in range(5):
            error = (lost @ value.double())[:, head, :, channel].reshape(-1, 1)
            mass = lost[:, head].sum(-1).reshape(-1, 1)
            expected = torch.linalg.lstsq(mass, error).solution.item()
            assert found.shift()[head, channel].item() == pytest.approx(expected, rel=1e-6)  # products in float32


def test_the_predicted_error_is_that_of_the_shifted_product():
    weights, value = random_attention()
    params = qparams_from_amax(torch.tensor(0.5))
    found = lost_mass(weights, value, params)
    for shift in (found.shift(), torch.zeros(3, 5).double()):
        moved = value - shift[:, None]
        output = params.fake_quantize(weights).double() @ moved + shift[:, None]
        direct = float((output - weights.double() @ value.double()).square().sum())
        assert found.error(shift) == pytest.approx(direct, rel=1e-5)
    assert found.error(found.shift()) < 0.5 * found.error(torch.zeros(3, 5))


def test_nothing_lost_needs_no_shift():
    weights = torch.eye(4).expand(2, 3, 4, 4)
    found = lost_mass(weights, torch.randn(2, 3, 4, 5), qparams_from_amax(torch.tensor(127 / 128)))
    assert torch.isfinite(found.shift()).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [({}, None), ({"head_dim": 24}, "head size 24"), ({"gate": torch.nn.Linear(1, 1)}, "gate")],
)
def test_what_has_no_int8_kernel_is_refused_with_the_reason(change, reason):
    attention = tiny_model("vit").net.blocks[0].attn
    for name, value in change.items():
        setattr(attention, name, value)
    found = obstacle(attention, 17)
    assert found is None if reason is None else reason in found


def test_too_many_tokens_have_no_int8_kernel():
    attention = tiny_model("vit").net.blocks[0].attn
    assert obstacle(attention, 512) is None
    assert "513 tokens" in str(obstacle(attention, 513))


def test_prepare_keeps_the_float_function_and_gives_all_four_roles():
    model = tiny_model("vit")
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    prepared = prepare(model, FOLDS, Config())
    x = tiny_batches(1, seed=3)[0]
    with torch.no_grad():
        torch.testing.assert_close(prepared.net(x), model.net(x), rtol=1e-4, atol=1e-4)
    assert prepared.int8_attention == ("blocks.0.attn", "blocks.1.attn")
    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())


def test_scales_cover_what_was_seen_and_probabilities_never_need_more_than_one():
    attention = tiny_model("vit").net.blocks[0].attn
    packed = [torch.randn(2, 17, 144, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    found = fit(attention, packed)
    value = torch.cat(packed)[..., -48:].reshape(4, 17, 3, 16).transpose(1, 2) - found.shift[:, None]
    assert float(found.params["value"].scale) * 127 >= float(value.abs().max())
    assert float(found.params["softmax"].scale) * 127 <= 1.001


def test_the_simulation_rounds_all_four_factors():
    model = rounded(Config())
    attention = quantized_net(model).blocks[0].attn
    assert isinstance(attention, QuantAttention)
    x = torch.randn(2, 17, 48)
    with torch.no_grad():
        qkv = attention.qkv(x).reshape(2, 17, 3, 3, 16).permute(2, 0, 3, 1, 4)
        query, key, value = qkv[0] / 2, qkv[1] / 2, qkv[2]  # 16^-1/4
        sites = {role: model.sites[f"blocks.0.attn:{role}"] for role in ATTENTION_ROLES}
        scores = sites["query"].fake_quantize(query) @ sites["key"].fake_quantize(key).transpose(-2, -1)
        weights = sites["softmax"].fake_quantize(scores.softmax(-1))
        by_hand = (weights @ sites["value"].fake_quantize(value)).transpose(1, 2).reshape(2, 17, 48)
        torch.testing.assert_close(attention(x), attention.proj(by_hand))
    with pytest.raises(NotImplementedError):
        attention(x, is_causal=True)


def test_all_keeps_all_and_a_budget_is_kept():
    everywhere = choose(rounded(Config("all")), FOLDS, Config("all"))
    assert len(everywhere.int8_attention) == 2
    nowhere = choose(rounded(Config()), FOLDS, Config(max_loss_db=-100.0))
    assert nowhere.int8_attention == ()
    assert set(nowhere.quantized_layers) == set(everywhere.quantized_layers)
    record = choose(rounded(Config()), FOLDS, Config(max_loss_db=0.5)).history[-1]
    assert record.sqnr_before_db is not None
    assert record.sqnr_after_db is not None
    assert record.sqnr_after_db >= record.sqnr_before_db - 0.5


def test_the_cheapest_blocks_come_first():
    model = rounded(Config())
    coarse = {f"blocks.0.attn:{role}": qparams_from_amax(torch.tensor(500.0)) for role in ATTENTION_ROLES}
    chosen = choose(model.with_sites(coarse), FOLDS, Config(max_loss_db=1.0))
    assert "blocks.0.attn" not in chosen.int8_attention


def test_a_family_without_attention_is_refused():
    with pytest.raises(UserError, match="family 'resnet' has none"):
        prepare(tiny_model("resnet"), FOLDS, Config())


def test_unknown_modes_are_refused():
    with pytest.raises(ValueError, match="int8 'some' is not one of budget, all"):
        Config("some")


def test_half_an_attention_is_none():
    model = rounded(Config())
    partial = dataclasses.replace(model, sites={s: p for s, p in model.sites.items() if not s.endswith(":key")})
    assert partial.int8_attention == ()
