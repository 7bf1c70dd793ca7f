import copy
import itertools
from dataclasses import replace

import pytest
import torch

from calib.attention.int8 import (
    SOFTMAX_THRESHOLDS,
    Attentions,
    Config,
    Fit,
    best_threshold,
    fit,
    int8_attention,
    look,
    lost_mass,
    merged,
    together,
    why_not_int8,
    with_attention,
)
from calib.errors import UserError
from calib.judge.budget import Budget
from calib.network.qdq import QuantAttention, quantized_net
from calib.precision import Precision
from calib.quant_model import ATTENTION_ROLES
from calib.quantizer import qparams_from_amax
from calib.scales.equalise import apply_moves
from calib.structure.moves import Moved
from tests.tiny import calibrated, output_db, rounded, tiny_batches, tiny_halves, tiny_model

HALVES = tiny_halves(2)
BLOCKS = ("blocks.0.attn", "blocks.1.attn")


@pytest.fixture(scope="module")
def plain():
    """A network whose layers are rounded, with attention in floating point."""
    return rounded(calibrated("vit", HALVES), HALVES)


@pytest.fixture(scope="module")
def found(plain):
    """Its attentions."""
    return Attentions(plain, HALVES)


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
        shift = Moved("blocks.0.attn.qkv", ("blocks.0.attn.proj",), torch.ones(48).double(), mean)
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
    one, other = (look(attention, each, gradients) for each in (packed, opposite))
    _, which, shifted = best_threshold([[one, one], [one, one]], [0, 1])
    assert shifted
    assert fit(one, which, shifted).shift.any()
    _, which, shifted = best_threshold([[one, one], [other, other]], [0, 1])
    assert not shifted
    left = fit(one, which, shifted)
    assert not left.shift.any()
    assert left.narrowing == 1


def test_the_threshold_and_its_cost_are_those_of_the_parts_asked():
    """Weights of softmax near 1 in the first parts, even ones in the second. Oracle: the product, rounded directly."""
    attention = tiny_model("vit").net.blocks[0].attn
    torch.manual_seed(0)
    packed, gradients = torch.randn(4, 2, 17, 144), torch.randn(4, 4, 2, 17, 48)
    packed[::2, ..., :96] *= 6
    packed[..., 96:] += 3
    parts = [look(attention, *pair) for pair in zip(packed, gradients, strict=True)]
    sums = [parts[:2], parts[2:]]

    def noise(number, which, shift):
        """The squared output error on the images of this part, the long way."""
        query, key, value = packed[number].reshape(2, 17, 3, 3, 16).permute(2, 0, 3, 1, 4).double()
        weights, params = (query @ key.mT / 4).softmax(-1), qparams_from_amax(torch.tensor(SOFTMAX_THRESHOLDS[which]))
        error = params.fake_quantize(weights) @ (value - shift[:, None]) + shift[:, None] - weights @ value
        down = (gradients[number] * error.transpose(1, 2).flatten(2)).flatten(2).sum(2)
        return float(down.square().mean(0).sum())

    def cost(asked, which, shifted):
        shifts = [fit(merged(of_half), which, shifted).shift for of_half in sums]
        return sum(noise(2 * (1 - half) + part, which, shift) for half, shift in enumerate(shifts) for part in asked)

    chosen = set()
    for asked in ([0], [1], [0, 1]):
        least, which, shifted = best_threshold(sums, asked)
        costs = {pair: cost(asked, *pair) for pair in itertools.product(range(len(SOFTMAX_THRESHOLDS)), (False, True))}
        assert least == pytest.approx(costs[which, shifted], rel=1e-3)
        assert least == pytest.approx(min(costs.values()), rel=1e-3)
        chosen.add(which)
    assert len(chosen) > 1, "the parts have to disagree"


@pytest.mark.parametrize(
    ("change", "reason"),
    [({}, None), ({"head_dim": 24}, "head size 24"), ({"gate": torch.nn.Linear(1, 1)}, "gate")],
)
def test_what_has_no_int8_kernel_is_refused_with_the_reason(change, reason):
    attention = tiny_model("vit").net.blocks[0].attn
    for name, value in change.items():
        setattr(attention, name, value)
    found = why_not_int8(attention, 17)
    assert found is None if reason is None else reason in found


def test_too_many_tokens_have_no_int8_kernel():
    attention = tiny_model("vit").net.blocks[0].attn
    assert why_not_int8(attention, 512) is None
    assert "513 tokens" in str(why_not_int8(attention, 513))


def test_scales_cover_what_was_seen_and_probabilities_never_need_more_than_one():
    attention = tiny_model("vit").net.blocks[0].attn
    packed = [torch.randn(2, 17, 144, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    gradients = torch.randn(2, 2, 17, 48, generator=torch.Generator().manual_seed(2))
    found = fit(merged([look(attention, part, gradients) for part in packed]), 0, True)
    assert found.shift.any()
    value = torch.cat(packed)[..., -48:].reshape(4, 17, 3, 16).transpose(1, 2) - found.shift[:, None]
    assert float(found.params["value"].scale) * 127 >= float(value.abs().max())
    assert float(found.params["softmax"].scale) * 127 <= 1.001


def test_the_simulation_rounds_all_four_factors(plain, found):
    model = with_attention(plain, found.together.whole)
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


def test_shifts_alone_keep_what_the_rounded_network_computes():
    """By whole steps of what the projection reads, so that it rounds to the same. At 3 bits W m is far from W^ m."""
    model = rounded(calibrated("vit", HALVES, Precision(weights=3)), HALVES, bias_correction=True)
    inputs = {f"{name}.proj:input": model.qparams(f"{name}.proj:input") for name in BLOCKS}
    model = model.with_quantizers({name: replace(one, scale=one.scale * 2) for name, one in inputs.items()})
    steps = torch.arange(48).reshape(3, 16) % 21 - 10.0
    params = dict.fromkeys(ATTENTION_ROLES, qparams_from_amax(torch.tensor(1.0)))
    fits = {name: Fit(params, steps * model.qparams(f"{name}.proj:input").scale, narrowing=1.0) for name in BLOCKS}
    moved = with_attention(model, fits)
    roles = {f"{name}:{role}" for name in BLOCKS for role in ATTENTION_ROLES}
    alone = replace(moved, quantizers={name: grid for name, grid in moved.quantizers.items() if name not in roles})
    assert moved.int8_attention == BLOCKS
    x = tiny_batches(1, seed=3)[0]
    with torch.no_grad():
        before, exact = quantized_net(model)(x), model.exact_net(x)
        torch.testing.assert_close(quantized_net(alone)(x), before, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(moved.exact_net(x), exact, rtol=1e-4, atol=1e-4)
        for name in BLOCKS:
            net = copy.deepcopy(alone.net)
            net.get_submodule(f"{name}.proj").bias = model.net.get_submodule(f"{name}.proj").bias
            without = quantized_net(replace(alone, net=net))(x)
            assert float((without - before).abs().max()) > 0.1, "the projection makes up for the shift"


def test_all_keeps_all_and_says_what_it_costs(plain, found):
    chosen = int8_attention(plain, HALVES, Config("all"))
    assert chosen.int8_attention == BLOCKS
    assert chosen.quantized_layers == plain.quantized_layers
    shifted = [f"{name}.qkv" for name, each in found.together.whole.items() if each.shift.any()]
    assert [one.producer for one in chosen.moved] == shifted != []
    record = chosen.history[-1]
    assert (record.stage, record.config) == ("attention", {"int8": "all", "max_loss_db": 1.0})
    assert record.notes[0].startswith("INT8 attention in 2 of 2 blocks: output SQNR ")
    assert output_db(chosen) == pytest.approx(record.sqnr_after_db, abs=1)
    assert output_db(plain) == pytest.approx(record.sqnr_before_db, abs=1)


@pytest.mark.parametrize("max_loss_db", [-1.0, 0.0])
def test_without_a_budget_the_network_is_what_it_was(plain, max_loss_db):
    chosen = int8_attention(plain, HALVES, Config(max_loss_db=max_loss_db))
    *earlier, record = chosen.history
    assert replace(chosen, history=()) == replace(plain, history=())
    assert chosen.net is plain.net
    assert chosen.exact_net is plain.exact_net
    assert tuple(earlier) == plain.history
    assert record.notes[0].startswith("dropped, no INT8 attention: ")
    assert record.sqnr_after_db == record.sqnr_before_db


def test_a_loss_that_only_the_images_that_judge_show_leaves_no_attention(plain, monkeypatch):
    monkeypatch.setattr(Budget, "affordable", lambda *_: list(BLOCKS))
    chosen = int8_attention(plain, HALVES, Config(max_loss_db=-1.0))
    assert chosen.net is plain.net
    assert chosen.quantizers is plain.quantizers
    note = chosen.history[-1].notes[0]
    assert note.startswith("dropped, no INT8 attention: INT8 attention in 2 of 2 blocks: ")


def test_the_budget_is_kept_on_new_images(plain):
    chosen = int8_attention(plain, HALVES, Config(max_loss_db=3.0))
    assert chosen.int8_attention
    assert output_db(chosen) >= output_db(plain) - 3.5


def noise_of(model):
    """What rounding costs at the output, on all images twice over: each chooses for both rotations."""
    images = torch.cat([*HALVES[0], *HALVES[1]])
    with torch.no_grad():
        return float((quantized_net(model)(images) - model.float_net(images)).square().sum())


def affordable(model, found, max_loss_db, costs):
    budget = Budget(model, HALVES, found.candidate, max_loss_db)
    return budget.affordable(sorted(costs, key=costs.__getitem__), costs, (0, 1))


def test_the_cheapest_blocks_come_first(plain, found):
    noise = noise_of(plain)  # 20 dB: as much as 99 times that
    costs = {BLOCKS[0]: 1e3 * noise, BLOCKS[1]: 1e-3 * noise}
    assert affordable(plain, found, 20.0, costs) == [BLOCKS[1]]
    costs = {BLOCKS[0]: 2e-3 * noise, BLOCKS[1]: 1e-3 * noise}
    assert affordable(plain, found, 20.0, costs) == [BLOCKS[1], BLOCKS[0]]
    costs = {BLOCKS[0]: 60 * noise, BLOCKS[1]: 60 * noise}
    assert affordable(plain, found, 20.0, costs) == [BLOCKS[0]], "costs add up"
    assert affordable(plain, found, 20.0, dict.fromkeys(BLOCKS, 120 * noise)) == []


def test_what_was_foretold_too_cheap_is_given_back(plain):
    found = Attentions(plain, HALVES)
    coarse = dict.fromkeys(ATTENTION_ROLES, qparams_from_amax(torch.tensor(5000.0)))
    for choice in (*found.choices, found.together):
        for fits in (*choice.by_half, choice.whole):
            fits[BLOCKS[1]] = fits[BLOCKS[1]]._replace(params=coarse)
    costs = {BLOCKS[0]: 1e-12, BLOCKS[1]: 2e-12}
    assert affordable(plain, found, 90.0, costs) == [*BLOCKS]
    names = affordable(plain, found, 3.0, costs)
    assert names == [BLOCKS[0]]


def test_blocks_left_out_stay_as_they_were(plain, found):
    chosen = with_attention(plain, {BLOCKS[0]: found.together.whole[BLOCKS[0]]})
    assert chosen.int8_attention == (BLOCKS[0],)
    changed = {
        name for name, value in chosen.net.state_dict().items() if not torch.equal(value, plain.net.state_dict()[name])
    }
    assert changed == {f"{BLOCKS[0]}.qkv.bias", f"{BLOCKS[0]}.proj.bias"}
    for quantizer, grid in plain.quantizers.items():
        same = torch.equal(chosen.qparams(quantizer).scale, grid.scale)
        assert same or quantizer == f"{BLOCKS[0]}.proj:input", quantizer
    assert with_attention(plain, {}) is plain


def test_a_network_without_attention_is_refused():
    with pytest.raises(UserError, match="ResNet has none"):
        int8_attention(tiny_model("resnet"), HALVES, Config())


def test_unknown_modes_are_refused():
    with pytest.raises(ValueError, match="int8 'some' is not one of budget, all"):
        Config("some")


def test_a_budget_beyond_all_sense_is_refused():
    with pytest.raises(ValueError, match="max_loss_db 5000 is not a number up to 100"):
        Config(max_loss_db=5000)
    with pytest.raises(ValueError, match="max_loss_db nan is not a number up to 100"):
        Config(max_loss_db=float("nan"))


def test_half_an_attention_is_none(plain, found):
    model = with_attention(plain, found.together.whole)
    partial = replace(model, quantizers={s: p for s, p in model.quantizers.items() if not s.endswith(":key")})
    assert partial.int8_attention == ()
