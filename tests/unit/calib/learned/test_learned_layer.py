import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from calib.grids import Unrounded, input_grid
from calib.learned.learned_layer import (
    DEQUANT_SCALE,
    INPUT_SCALE,
    OFFSET,
    ROUNDING,
    SCALE,
    LearnedInput,
    LearnedLayer,
    Mode,
)
from calib.learned.reconstruction import Phase, Schedule, Task, channel_loss, reconstruct
from calib.network.qdq import SimulatedLayer, rounding_module
from calib.network.rounded_layer import rounded_layer, with_gain_and_offset
from calib.quantizer import QParams, channel_qparams, quantize

LAYERS = {
    "linear": (lambda: nn.Linear(8, 6), (5, 8)),
    "no bias": (lambda: nn.Linear(8, 6, bias=False), (5, 8)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 6, 5, 5)),
    "grouped": (lambda: nn.Conv2d(8, 6, 3, stride=2, groups=2), (2, 8, 7, 7)),
}
SCHEDULE = Schedule(iterations=400, batch=256, rounding_rate=2e-2, step_rate=5e-3, regulariser=0.01, drop=0.0)


def learned(kind="linear", bits=4, nearest=False, seed=0):
    torch.manual_seed(seed)
    make, shape = LAYERS[kind]
    layer, x = make().requires_grad_(False), torch.randn(shape)
    mode = Mode()
    params = channel_qparams(layer.weight, bits)
    return LearnedLayer(layer, params, LearnedInput(input_grid(float(x.abs().max()), bits), mode), mode, nearest), x


def simulated(layer, rounded):
    """What the simulation runs after `rounded` has been put in place of `layer`, see `with_layers`."""
    copy = type(layer.layer)
    plain = layer.layer
    if copy is nn.Linear:
        put = nn.Linear(plain.in_features, plain.out_features)
    else:
        put = nn.Conv2d(plain.in_channels, plain.out_channels, plain.kernel_size, plain.stride, plain.padding,
                        groups=plain.groups)  # fmt: skip
    put.weight.data = rounded.weight.reshape(plain.weight.shape)
    put.bias.data = rounded.bias.flatten()
    return SimulatedLayer(
        put.requires_grad_(False), rounding_module("x", layer.reads.grid), rounding_module("w", rounded.params)
    )


def task_of(layer, x, target, held_out=None):
    pair = (x, target) if held_out is None else held_out

    def loss(indices):
        return channel_loss(layer(x[indices]), target[indices])

    return Task({"layer": layer}, layer.mode, len(x), loss, lambda: float(channel_loss(layer(pair[0]), pair[1])))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_it_starts_as_the_layer_rounded_to_nearest(kind, bits):
    layer, x = learned(kind, bits)
    torch.testing.assert_close(layer(x), simulated(layer, rounded_layer(layer.layer, layer.params))(x))
    layer.mode.soft, layer.mode.exact_inputs = True, True
    torch.testing.assert_close(layer(x), layer.layer(x), rtol=0, atol=5e-3)  # h = frac; only FP16 steps clip


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("nearest", [False, True])
def test_the_folded_layer_computes_what_was_learned(kind, nearest):
    layer, x = learned(kind, nearest=nearest)
    with torch.no_grad():
        for name, parameter in layer.quantities().items():
            parameter.add_(torch.randn_like(parameter) * (2 if name == ROUNDING else 0.1))
        rounded = layer.rounded()
        torch.testing.assert_close(simulated(layer, rounded)(x), layer(x), rtol=1e-6, atol=1e-6)
        assert not torch.allclose(layer(x), learned(kind, nearest=nearest)[0](x), atol=1e-2)
    gains = layer.gain().reshape(rounded.bias.shape)[..., None]
    unfolded = gains * rounded_weight_at_start(layer, rounded)
    torch.testing.assert_close(rounded.weight, unfolded, rtol=2**-10, atol=0)  # two roundings to FP16


def rounded_weight_at_start(layer, rounded):
    return rounded.integers * layer.params.scale.reshape(rounded.bias.shape)[..., None]


def test_gain_and_offset_act_on_the_output_as_in_eq_8():
    layer, x = learned()
    before = layer(x) - layer.bias
    with torch.no_grad():
        layer.dequant_factor.copy_(torch.tensor([0.5, 2.0, 1.0, 0.25, 1.0, 4.0]))  # FP16 keeps these exact
        layer.offset.copy_(torch.linspace(-1, 1, 6))
    torch.testing.assert_close(
        layer(x), layer.dequant_factor * before + layer.bias + layer.offset, rtol=1e-6, atol=1e-6
    )


def test_a_negative_gain_goes_into_the_integers():
    layer, x = learned()
    rounded = layer.rounded()
    gain = torch.tensor([[-1.0, 1.0, -0.5, 2.0, -4.0, 1.0]])
    found = with_gain_and_offset(rounded, gain, torch.zeros(1, 6))
    y = simulated(layer, found)(x) - layer.bias
    torch.testing.assert_close(y, gain[0] * (simulated(layer, rounded)(x) - layer.bias), rtol=1e-6, atol=1e-6)
    assert (found.params.scale > 0).all()


@pytest.mark.parametrize("bits", [8, 3])
def test_hard_rounding_takes_a_neighbour_within_the_range(bits):
    layer, _ = learned("grouped", bits)
    layer.params = replace(layer.params, scale=layer.params.scale * 0.7)  # clips some
    with torch.no_grad():
        layer.alpha.normal_(generator=torch.Generator().manual_seed(1))
    exact = layer.layer.weight / layer.params.scale.reshape(-1, 1, 1, 1)
    integers = layer.rounded().integers.reshape(exact.shape)
    high = layer.params.high
    lower, upper = exact.floor().clamp(-high, high), exact.ceil().clamp(-high, high)
    assert ((integers == lower) | (integers == upper)).all()
    assert (integers == lower)[lower != upper].any()
    assert (integers == upper)[lower != upper].any()


def test_a_clipped_weight_is_frozen():
    layer, _ = learned(bits=3)
    clipped = LearnedLayer(
        layer.layer, replace(layer.params, scale=layer.params.scale * 0.6), layer.reads, Mode(soft=True)
    )
    clipped.learn((ROUNDING,))
    clipped.integers().sum().backward()
    exact = clipped.layer.weight / clipped.params.scale[:, None]
    outside = (exact < -3) | (exact >= 3)
    assert outside.any()
    assert (clipped.alpha.grad[outside] == 0).all()
    assert (clipped.alpha.grad[~outside] > 0).all()


def test_an_input_step_learns_by_lsq():
    """Against the derivative of s (round(x / s) clipped) that LSQ states: -x/s + round(x/s) inside, the bound outside."""
    mode = Mode()
    grid = QParams(torch.tensor(0.25), bits=3)
    reads = LearnedInput(grid, mode)
    reads.scale_factor.requires_grad_(True)
    x = torch.tensor([0.3, -0.3, 5.0, -5.0, 0.11], requires_grad=True)
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    y = reads(x)
    assert torch.equal(y, grid.fake_quantize(x))
    (y * upstream).sum().backward()
    assert x.grad.tolist() == [1, 2, 0, 0, 5]
    by_step = torch.tensor([1 - 1.2, -1 + 1.2, 3, -4, 0 - 0.44])
    assert float(reads.scale_factor.grad) == pytest.approx(
        float((by_step * upstream).sum()) * 0.25 / (5 * 3) ** 0.5, rel=1e-5
    )


def test_other_grids_have_no_step_to_learn():
    mode = Mode()
    layer = learned()[0].layer
    other = LearnedLayer(layer, channel_qparams(layer.weight), LearnedInput(Unrounded(), mode), mode)
    assert INPUT_SCALE not in other.quantities()
    x = torch.randn(3, 8)
    assert torch.equal(other.reads(x), x)


def test_dropped_inputs_do_not_round():
    layer, x = learned()
    reads = layer.reads
    layer.mode.soft, layer.mode.drop, layer.mode.generator = True, 0.5, torch.Generator().manual_seed(0)
    x = torch.randn(100, 100)
    mixed, rounded = reads(x), reads.grid.fake_quantize(x)
    assert ((mixed == x) | (mixed == rounded)).all()
    assert 0.45 < float((mixed == x).float().mean()) < 0.55
    layer.mode.soft = False
    assert torch.equal(reads(x), rounded)


def correlated(rows=256, columns=8):
    """Columns with a common part, as after ReLU."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, columns, generator=generator) + 2 * torch.randn(rows, 1, generator=generator)


def brute_force(weight, params, x):
    """The least error of a row over all choices of neighbours, row by row."""
    floor = (weight / params.scale[:, None]).floor()
    choices = torch.tensor(list(itertools.product((0.0, 1.0), repeat=weight.shape[1])))
    total = 0.0
    for row in range(len(weight)):
        integers = (floor[row] + choices).clamp(-params.high, params.high)
        errors = ((integers * params.scale[row] - weight[row]) @ x.T).square().sum(1)
        total += float(errors.min()) / len(x)
    return total


def test_learned_rounding_beats_nearest_and_equals_brute_force():
    torch.manual_seed(0)
    plain, x, mode = nn.Linear(8, 8).requires_grad_(False), correlated(), Mode()
    layer = LearnedLayer(plain, channel_qparams(plain.weight, 3), LearnedInput(Unrounded(), mode), mode)
    target = plain(x)
    schedule = replace(SCHEDULE, iterations=300)
    before, after = reconstruct(task_of(layer, x, target), (Phase((ROUNDING,)),), schedule)
    best = brute_force(plain.weight, layer.params, x)
    assert after < 0.5 * before
    assert after == pytest.approx(best, rel=1e-4)
    rounded = layer.rounded()
    error = float((x @ rounded.weight[0].T + rounded.bias[0] - target).square().sum()) / len(x)
    assert error == pytest.approx(after, rel=1e-4)


def test_planted_gain_and_offset_are_recovered_and_integers_stay():
    torch.manual_seed(0)
    plain, x, mode = nn.Linear(8, 6).requires_grad_(False), torch.randn(512, 8), Mode()
    right = channel_qparams(plain.weight, 4)
    plain.weight.data = right.fake_quantize(plain.weight)
    gain, offset = torch.tensor([0.7, 0.8, 0.9, 1.0, 1.1, 1.25]), torch.linspace(-0.3, 0.3, 6)
    wrong = nn.Linear(8, 6).requires_grad_(False)  # the same integers, dequantized wrongly
    wrong.weight.data, wrong.bias.data = plain.weight / gain[:, None], plain.bias - offset
    layer = LearnedLayer(wrong, replace(right, scale=right.scale / gain), LearnedInput(Unrounded(), mode), mode)
    target = plain(x)
    integers = layer.rounded().integers
    reconstruct(task_of(layer, x, target), (Phase((DEQUANT_SCALE, OFFSET)),), SCHEDULE)
    torch.testing.assert_close(layer.gain().detach(), gain, rtol=5e-3, atol=0)
    torch.testing.assert_close(layer.offset.detach() * layer.unit, offset, rtol=0, atol=5e-3)
    assert torch.equal(layer.rounded().integers, integers)
    assert torch.equal(integers, quantize(plain.weight, right)[None])


def test_without_gain_and_offset_it_is_adaround():
    """Written the short way: eq. 2 with a frozen step, Adam, the regulariser."""
    torch.manual_seed(0)
    plain, x, mode = nn.Linear(8, 6).requires_grad_(False), correlated(), Mode()
    params, target = channel_qparams(plain.weight, 3), plain(x)
    layer = LearnedLayer(plain, params, LearnedInput(Unrounded(), mode), mode)
    schedule = replace(SCHEDULE, iterations=50, batch=len(x))
    always_better = iter(range(11, 0, -1)).__next__
    reconstruct(replace(task_of(layer, x, target), held_out=always_better), (Phase((ROUNDING,)),), schedule)

    scale = params.scale[:, None]
    floor = (plain.weight / scale).floor()
    share = plain.weight / scale - floor
    alpha = (-torch.log(1.2 / (share + 0.1) - 1)).requires_grad_(True)
    optimiser = torch.optim.Adam([alpha], lr=schedule.rounding_rate)
    for step in range(50):
        h = torch.clamp(1.2 * torch.sigmoid(alpha) - 0.1, 0, 1)
        w = scale * (floor + h).clamp(-3, 3)
        loss = (F.linear(x, w, plain.bias) - target).square().sum(1).mean()
        if step >= 10:
            beta = 20 - 18 * (step / 50 - 0.2) / 0.8
            loss = loss + schedule.regulariser * (1 - (2 * h[floor < 3] - 1).abs() ** beta).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    by_hand = (floor + (alpha >= 0)).clamp(-3, 3)
    assert torch.equal(layer.rounded().integers[0], by_hand.to(torch.int8))
    assert (layer.gain() == 1).all()
    assert (layer.offset == 0).all()


def test_the_best_look_remains():
    """On images held out nothing gets better: the start remains."""
    layer, x = learned()
    start = [value.detach().clone() for value in layer.quantities().values()]
    looks = iter([1.0, *[2.0] * 10])
    task = replace(task_of(layer, x, layer.layer(x) * 2), held_out=lambda: next(looks))
    assert reconstruct(task, (Phase((ROUNDING, DEQUANT_SCALE)),), replace(SCHEDULE, iterations=10)) == (1.0, 1.0)
    for value, before in zip(layer.quantities().values(), start, strict=True):
        assert torch.equal(value, before)
    assert not any(value.requires_grad for value in layer.quantities().values())


def test_a_step_stays_positive():
    layer, _ = learned()
    with torch.no_grad():
        layer.dequant_factor[0], layer.scale_factor[1], layer.alpha[0, 0] = -1.0, 0.0, -5.0
    layer.keep_positive()
    assert layer.dequant_factor[0] == pytest.approx(0.01)
    assert layer.scale_factor[1] == pytest.approx(0.01)
    assert layer.alpha[0, 0] == -5


def test_nearest_weights_follow_a_step_that_learns():
    """Case 1.2, LSQ: one step makes the integers and multiplies them."""
    layer, x = learned(bits=3, nearest=True)
    layer.learn((SCALE,))
    before, after = reconstruct(task_of(layer, x, layer.layer(x)), (Phase((SCALE,)),), replace(SCHEDULE, iterations=60))
    assert after < before
    step = layer.params.scale * layer.scale_factor.detach()
    nearest = (layer.layer.weight / step[:, None]).round().clamp(-3, 3)
    assert torch.equal(layer.rounded().integers[0], nearest.to(torch.int8))


def test_soft_layers_have_no_integers():
    layer, _ = learned()
    layer.mode.soft = True
    with pytest.raises(ValueError, match="soft"):
        layer.rounded()
