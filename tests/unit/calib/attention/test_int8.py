import copy
import dataclasses

import pytest
import torch

from calib.attention.int8 import (
    NOISE,
    Config,
    choose,
    fit,
    look,
    lost_mass,
    obstacle,
    prepare,
    together,
    without_attention,
)
from calib.errors import UserError
from calib.methods import rtn
from calib.network.qdq import QuantAttention, quantized_net
from calib.quant_model import ATTENTION_ROLES
from calib.quantizer import qparams_from_amax
from calib.scales.calibrate import Config as CalibrateConfig
from calib.scales.calibrate import calibrate
from calib.scales.equalise import apply_moves
from calib.structure.moves import Moved
from tests.tiny import tiny_batches, tiny_model

FOLDS = [tiny_batches(2, seed=1), tiny_batches(2, seed=2)]


def rounded(config: Config):
    model = calibrate(prepare(tiny_model("vit"), FOLDS, config), FOLDS, CalibrateConfig("max"))
    return rtn.reduce_error(model, FOLDS, rtn.Config())


def random_attention(seed: int = 0):
    """Weights (B, H, N, N) over many tokens, none of them large, values (B, H, N, D) with something in common, and g."""
    torch.manual_seed(seed)
    value = torch.randn(2, 3, 40, 5) + 4 * torch.randn(1, 3, 1, 5)
    return torch.softmax(torch.randn(2, 3, 40, 40), dim=-1), value, torch.randn(4, 2, 3, 40, 5)


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
    weights, value, gradients = random_attention()
    params = qparams_from_amax(torch.tensor(1.0))
    found = lost_mass(weights, value, gradients, params)
    lost = (weights - params.fake_quantize(weights)).double()
    for head in range(3):
        for channel in range(5):
            error = (lost @ value.double())[:, head, :, channel].reshape(-1, 1)
            mass = lost[:, head].sum(-1).reshape(-1, 1)
            expected = torch.linalg.lstsq(mass, error).solution.item()
            assert found.shift()[head, channel].item() == pytest.approx(expected, rel=1e-5)  # products in float32


def test_the_predicted_noise_is_that_of_the_shifted_product():
    weights, value, gradients = random_attention()
    params = qparams_from_amax(torch.tensor(0.5))
    found = lost_mass(weights, value, gradients, params)
    for shift in (found.shift(), torch.zeros(3, 5).double()):
        moved = value - shift[:, None]
        error = params.fake_quantize(weights).double() @ moved + shift[:, None] - weights.double() @ value.double()
        direct = sum(float((g * error).flatten(1).sum(1).square().sum()) for g in gradients) / len(gradients)
        assert found.noise(shift) == pytest.approx(direct, rel=1e-4)
    assert found.noise(found.shift()) < 0.5 * found.noise(torch.zeros(3, 5))


def test_parts_add_up_to_the_whole():
    weights, value, gradients = random_attention()
    params = qparams_from_amax(torch.tensor(0.5))
    parts = [lost_mass(weights[i : i + 1], value[i : i + 1], gradients[:, i : i + 1], params) for i in (0, 1)]
    for ours, theirs in zip(together(parts), lost_mass(weights, value, gradients, params), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_nothing_lost_needs_no_shift():
    weights = torch.eye(4).expand(2, 3, 4, 4)
    found = lost_mass(
        weights, torch.randn(2, 3, 4, 5), torch.randn(1, 2, 3, 4, 5), qparams_from_amax(torch.tensor(127 / 128))
    )
    assert torch.isfinite(found.shift()).all()


def test_a_shift_that_does_not_carry_over_is_not_taken():
    attention = tiny_model("vit").net.blocks[0].attn
    torch.manual_seed(0)
    packed, gradients = torch.randn(2, 17, 144), torch.randn(4, 2, 17, 48)
    opposite = packed.clone()
    packed[..., 96:] += 3
    opposite[..., 96:] -= 3
    agreeing = fit([look(attention, packed, gradients)] * 2)
    assert agreeing.shift.any()
    contradicting = fit([look(attention, each, gradients) for each in (packed, opposite)])
    assert not contradicting.shift.any()
    assert contradicting.range == 1


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
    gradients = torch.randn(2, 2, 17, 48, generator=torch.Generator().manual_seed(2))
    found = fit([look(attention, part, gradients) for part in packed])
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
        quantizers = {role: model.quantizers[f"blocks.0.attn:{role}"] for role in ATTENTION_ROLES}
        scores = quantizers["query"].fake_quantize(query) @ quantizers["key"].fake_quantize(key).transpose(-2, -1)
        weights = quantizers["softmax"].fake_quantize(scores.softmax(-1))
        by_hand = (weights @ quantizers["value"].fake_quantize(value)).transpose(1, 2).reshape(2, 17, 48)
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


def with_costs(model, **costs: float):
    """`model` whose attentions cost these shares of the noise without them, by the record of `prepare`."""
    images = torch.cat([batch for fold in FOLDS for batch in fold])
    with torch.no_grad():
        plain = quantized_net(without_attention(model))(images) - model.float_net(images)
    noise = {f"blocks.{name[-1]}.attn": share * float(plain.square().sum()) for name, share in costs.items()}
    (record,) = (record for record in model.history if record.stage == "attention")
    changed = dataclasses.replace(record, details={**record.details, NOISE: noise})
    return dataclasses.replace(model, history=tuple(changed if each is record else each for each in model.history))


def test_the_cheapest_blocks_come_first():
    model = rounded(Config())
    chosen = choose(with_costs(model, block0=1e3, block1=1e-3), FOLDS, Config(max_loss_db=20.0))
    assert chosen.int8_attention == ("blocks.1.attn",)
    chosen = choose(with_costs(model, block0=1e-3, block1=1e-3), FOLDS, Config(max_loss_db=20.0))
    assert chosen.int8_attention == ("blocks.0.attn", "blocks.1.attn")


def test_what_was_foretold_too_cheap_is_given_back():
    model = with_costs(rounded(Config()), block0=1e-9, block1=1e-9)
    coarse = {f"blocks.1.attn:{role}": qparams_from_amax(torch.tensor(5000.0)) for role in ATTENTION_ROLES}
    chosen = choose(model.with_quantizers(coarse), FOLDS, Config(max_loss_db=1e-6))
    record = chosen.history[-1]
    assert record.sqnr_after_db >= record.sqnr_before_db - 1e-6
    assert "blocks.1.attn" not in chosen.int8_attention


@pytest.mark.parametrize("rounded_weights", [False, True])
def test_blocks_left_out_read_what_they_read_before(rounded_weights):
    model = tiny_model("vit")
    for block in model.net.blocks:
        block.attn.qkv.bias.data[96:] += 3  # something in common that a shift takes away
    prepared = calibrate(prepare(model, FOLDS, Config()), FOLDS, CalibrateConfig("max"))
    assert len(prepared.moved) == 2
    if rounded_weights:
        prepared = dataclasses.replace(prepared, net=copy.deepcopy(prepared.net))
    bare = without_attention(prepared)
    plain = calibrate(model, FOLDS, CalibrateConfig("max"))
    assert bare.int8_attention == ()
    assert set(bare.quantizers) == set(plain.quantizers)
    for net in (bare.net, bare.exact_net):
        for name, value in net.state_dict().items():
            torch.testing.assert_close(value, model.net.state_dict()[name], rtol=1e-4, atol=1e-5)
    for quantizer, params in plain.quantizers.items():
        # the range with the shift comes from a sample of the images
        torch.testing.assert_close(bare.quantizers[quantizer].scale, params.scale, rtol=0.1, atol=0)
    again = without_attention(bare).net.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in bare.net.state_dict().items())


def test_a_family_without_attention_is_refused():
    with pytest.raises(UserError, match="family 'resnet' has none"):
        prepare(tiny_model("resnet"), FOLDS, Config())


def test_unknown_modes_are_refused():
    with pytest.raises(ValueError, match="int8 'some' is not one of budget, all"):
        Config("some")


def test_half_an_attention_is_none():
    model = rounded(Config())
    partial = dataclasses.replace(
        model, quantizers={s: p for s, p in model.quantizers.items() if not s.endswith(":key")}
    )
    assert partial.int8_attention == ()
