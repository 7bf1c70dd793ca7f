"""Asymmetric ranges: statistics against sorted arrays, grids against every level written out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.errors import UserError
from calib.grids import (
    LogSqrt2,
    TwinUniform,
    Unrounded,
    input_grid,
    sides_of,
    straight_through,
    twin_gelu,
    twin_softmax,
)
from calib.hooks import input_hooks
from calib.methods import rtn
from calib.network.qdq import quantized_net
from calib.precision import Precision
from calib.quant_model import QuantModel
from calib.scales.calibrate import Config, calibrate
from calib.scales.equalise import Config as EqualiseConfig
from calib.scales.equalise import equalise
from calib.statistics.observers import Histogram
from calib.statistics.signed_ranges import (
    PERCENTILES,
    SignedHistogram,
    grid_from_histogram,
    least_squares_grid,
    percentile_range,
)
from tests.tiny import tiny_batches, tiny_halves, tiny_model

BIN_WIDTH = 2**-9  # relative: 512 bins an octave


def histogram_of(*parts: torch.Tensor) -> SignedHistogram:
    histogram = SignedHistogram()
    for part in parts:
        histogram.update(part)
    return histogram


def skewed(count: int = 20_000, seed: int = 0) -> torch.Tensor:
    """Like a GELU's output: a bounded negative side, a long positive one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.gelu(3 * torch.randn(count, generator=generator))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_log_sqrt2_takes_the_nearest_of_all_levels_in_the_log_domain(bits, scale):
    x = torch.rand(3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 8
    # the paper's formula, level by level: 2^-ceil(k/2), times sqrt 2 for odd k
    levels = np.array([scale * 2.0 ** -np.ceil(k / 2) * (1 + (k % 2) * (np.sqrt(2) - 1)) for k in range(2**bits)])
    distance = np.abs(np.log2(x.numpy())[:, None] - np.log2(levels))
    expected = levels[distance.argmin(1)]
    expected[x.numpy() < levels[-1] * 2**-0.25] = 0  # nearer to the level after the last
    found = LogSqrt2(scale, bits).fake_quantize(x)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-12, atol=0)
    reached = np.unique(expected)
    assert len(reached) == 2**bits + 1 or bits == 8


def test_log_sqrt2_of_nothing_is_nothing_and_keeps_the_dtype():
    grid = LogSqrt2(0.5, 4)
    assert grid.fake_quantize(torch.tensor([0.0, -0.1, 0.5, 7.0])).tolist() == [0.0, 0.0, 0.5, 0.5]
    assert grid.fake_quantize(torch.rand(3).half()).dtype == torch.float16
    x = torch.tensor([0.1, 0.4, 0.6], requires_grad=True)
    straight_through(x, grid).sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("split", [1.0, 0.25, 2.0**-7])
def test_the_twin_grid_takes_the_nearest_level_of_its_half(bits, split):
    x = torch.rand(3000, generator=torch.Generator().manual_seed(0)) ** 4
    x[0] = 1.0
    share = np.arange(2 ** (bits - 1)) / (2 ** (bits - 1) - 1)
    levels = np.where((x < split)[:, None], split * share, share)
    distance = np.abs(x.numpy()[:, None] - levels)
    grid = twin_softmax(split, bits)
    found = grid.fake_quantize(x)
    step = (found - x).abs().numpy() - distance.min(1)
    assert np.abs(step).max() < 1e-3  # steps are rounded to FP16, relative 2^-11
    assert len(np.unique(found)) <= 2**bits - 1  # both halves have the 0
    y = x.clone().requires_grad_()
    straight_through(y, grid).sum().backward()
    assert (y.grad[1:] == 1).all()
    outside = torch.tensor([-0.1, 1.1], requires_grad=True)
    straight_through(outside, grid).sum().backward()
    assert not outside.grad.any()


@given(st.permutations(range(6)), st.integers(50, 3000))
@settings(max_examples=10, deadline=None)
def test_any_order_and_any_split_give_the_same_statistics(order, batch):
    x = skewed(6000)
    whole = histogram_of(x)
    parts = histogram_of(*torch.cat([x.split(1000)[i] for i in order]).split(batch))
    merged = histogram_of(x[:1234]).merge(histogram_of(x[1234:]))
    for other in (parts, merged):
        assert torch.equal(whole.counts, other.counts)
        assert (whole.low, whole.high) == (other.low, other.high) == (float(x.min()), float(x.max()))


def test_both_signs_count_as_one_sided_histograms_do():
    x = skewed()
    lower, upper, count = histogram_of(x).populated()
    assert (lower.diff() > 0).all()
    assert (upper >= lower).all()
    negative, positive = Histogram(), Histogram()
    negative.update(x[x.signbit()])  # with the -0 of a GELU
    positive.update(x[~x.signbit()])
    assert torch.equal(count, torch.cat([negative.populated()[2].flip(0), positive.populated()[2]]))


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0, 99.9, 100.0])
@pytest.mark.parametrize("shift", [0.0, 1.0, -30.0])
def test_percentiles_are_the_sorted_elements_within_a_bin(percentile, shift):
    x = skewed() + shift
    ordered = np.sort(x.numpy())
    index = round(len(x) * percentile / 100)
    low, high = percentile_range(histogram_of(x), percentile)
    assert ordered[-index] >= low >= ordered[-index] - 2 * BIN_WIDTH * abs(ordered[-index])
    assert ordered[index - 1] <= high <= ordered[index - 1] + 2 * BIN_WIDTH * abs(ordered[index - 1]) + 1e-38


def loss_by_hand(x: np.ndarray, low: float, high: float, bits: int) -> float:
    """Mean squared error, from all levels written out."""
    step = (high - low) / (2**bits - 1)
    levels = step * (np.round(low / step) + np.arange(2**bits))
    return float((np.abs(x[:, None] - levels).min(1) ** 2).mean())


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_repq_takes_the_percentile_with_the_least_error(bits):
    x = skewed(100_000)
    x[::500] *= 2  # 0.2 % of outliers
    exact = [(np.quantile(x.numpy(), 1 - p / 100), np.quantile(x.numpy(), p / 100)) for p in PERCENTILES]
    losses = [loss_by_hand(x.numpy(), low, high, bits) for low, high in exact]
    found = grid_from_histogram(histogram_of(x), "repq", 0.0, bits)
    loss = float((found.fake_quantize(x) - x).square().mean())
    assert loss == pytest.approx(min(losses), rel=0.03)  # edges of bins and a scale in FP16, where these are exact
    assert max(losses) > 1.1 * min(losses)


@pytest.mark.parametrize("observer", ["max", "percentile", "mse", "repq"])
def test_observers_differ_as_their_names_say(observer):
    x = skewed()
    found = grid_from_histogram(histogram_of(x), observer, 99.0, 4)
    loss = float((found.fake_quantize(x) - x).square().mean())
    every = [loss_by_hand(x.numpy(), f * float(x.min()), f * float(x.max()), 4) for f in np.linspace(1, 0.02, 99)]
    reach = float(found.scale) * 15
    if observer == "max":
        assert reach == pytest.approx(float(x.max() - x.min()), rel=1e-3)
    elif observer == "percentile":
        assert reach == pytest.approx(np.subtract(*np.quantile(x.numpy(), [0.99, 0.01])), rel=0.01)
    else:
        assert reach < float(x.max() - x.min())
    assert loss >= 0.98 * min(every) if observer != "mse" else loss == pytest.approx(min(every), rel=0.02)


def test_least_error_can_choose_among_any_grids_and_ties_go_to_the_first():
    x = torch.rand(5000) ** 8
    grids = [LogSqrt2(float(scale), 4) for scale in (0.1, 0.9, 4.0)]
    assert least_squares_grid(histogram_of(x), grids) is grids[1]
    assert least_squares_grid(histogram_of(torch.zeros(3)), grids) is grids[0]


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("ends", [(0.0, 2.0), (-0.1, 2.0), (-3.0, 1.0), (0.5, 2.0), (-2.0, -0.5)])
def test_a_range_with_sides_has_all_its_levels_between_its_ends_and_one_at_0(bits, ends):
    x = torch.linspace(*ends, 2001)
    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    reach = max(-low, high)
    sides = sides_of(*(torch.tensor([end, sum(ends) / 2]) for end in ends))  # of two channels
    assert sides == pytest.approx((low / reach, high / reach))
    found = input_grid(reach, bits, sides).fake_quantize(x)
    step = (high - low) / (2**bits - 1)
    assert float((found - x).abs().max()) <= 1.01 * step / 2 + 0.5 * step * (
        low < 0 < high
    )  # 0 moves the ends half a step
    assert float(input_grid(reach, bits, sides).fake_quantize(torch.zeros(()))) == 0
    assert float((input_grid(reach, bits).fake_quantize(x) - x).abs().max()) > 0.9 * reach / (2**bits - 1)  # symmetric


def test_zeros_and_constants_have_a_grid():
    for value in (0.0, 3.0, -2.0):
        for observer in ("repq", "max", "mse"):
            grid = grid_from_histogram(histogram_of(torch.full((50,), value)), observer, 0.0, 4)
            assert float(grid.fake_quantize(torch.tensor([value]))) == pytest.approx(value, rel=0.01)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(UserError, match="'entropy' knows symmetric ranges only"):
        grid_from_histogram(histogram_of(skewed()), "entropy", 0.0, 4)
    with pytest.raises(UserError, match="'repq' is for inputs that round with zero points"):
        calibrate(tiny_model("vit"), HALVES, Config("repq"))
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="NaN or Inf"):
            histogram_of(torch.tensor([1.0, bad]))


HALVES = tiny_halves(2)


def test_calibrate_gives_every_layer_the_range_of_all_it_read():
    model = replace(tiny_model("vit"), precision=Precision(8, 4, first_last=8, zero_points=True))
    found = calibrate(model, HALVES, Config("max"))
    read: dict[str, list[torch.Tensor]] = {name: [] for name in model.layers}
    with input_hooks(model.net, read, lambda name, _layer, x: read[name].append(x)), torch.no_grad():
        for batch in (*HALVES[0], *HALVES[1]):
            model.net(batch)
    for name, parts in read.items():
        x, grid = torch.cat([part.flatten() for part in parts]), found.qparams(f"{name}:input")
        levels = 255 if model.structure.why_float(name) else 15
        assert float(grid.scale) * levels == pytest.approx(float(x.max() - x.min()), rel=1e-3)
        assert grid.zero_point is not None
    assert found.history[-1].notes == (f"{len(read)} asymmetric activation ranges by 'max'",)


def output_noise(model: QuantModel, batches: list[torch.Tensor]) -> float:
    model = rtn.nearest(replace(model, precision=replace(model.precision, weights=8))).whole
    net = quantized_net(model)
    with torch.inference_mode():
        return sum(float((net(batch) - model.float_net(batch)).square().sum()) for batch in batches)


@pytest.mark.parametrize("family", ["vit", "mobilenet"])
def test_a_search_with_zero_points_has_less_output_error_than_symmetric_ranges(family):
    halves = tiny_halves(8)
    asymmetric = replace(tiny_model(family), precision=Precision(8, 4, zero_points=True))
    found = calibrate(asymmetric, halves, Config("search"))
    symmetric = calibrate(replace(asymmetric, precision=Precision(8, 4)), halves, Config("search"))
    grids = [found.qparams(f"{name}:input") for name in found.layers]
    assert all(grid.zero_point is not None for grid in grids)
    assert "on held-out images" in found.history[-1].notes[0]
    one_sided = [grid for grid in grids if float(grid.zero_point) == grid.low]  # behind a ReLU6: 0 is the lowest level
    assert one_sided or family != "mobilenet"
    others = tiny_batches(8, seed=3)
    assert output_noise(found, others) < output_noise(symmetric, others)


@pytest.mark.parametrize("observer", ["search", "max"])
def test_calibrate_keeps_quantizers_that_are_there_and_rounds_no_input_of_32_bits(observer):
    model = replace(tiny_model("vit"), precision=Precision(4, 32, zero_points=True))
    given = {"blocks.0.attn.qkv:input": LogSqrt2(1.0, 4)}
    quantizers = calibrate(model.with_quantizers(given), HALVES, Config(observer)).quantizers
    assert len(quantizers) == len(model.layers)
    assert quantizers["blocks.0.attn.qkv:input"] is given["blocks.0.attn.qkv:input"]
    assert all(isinstance(grid, Unrounded) for quantizer, grid in quantizers.items() if quantizer not in given)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_the_twin_grid_of_a_gelu_has_half_its_levels_on_the_short_negative_side(bits):
    x = skewed()
    amax = float(x.max())
    share = np.arange(2 ** (bits - 1)) / (2 ** (bits - 1) - 1)
    levels = np.where((x.numpy() < 0)[:, None], -0.17 * share, amax * share)
    distance = np.abs(x.numpy()[:, None] - levels).min(1)
    found = twin_gelu(amax, bits).fake_quantize(x)
    assert np.abs((found - x).abs().numpy() - distance).max() < 1e-3 * amax  # FP16 steps
    assert 2**bits - 4 < len(np.unique(found)) <= 2**bits - 1  # both halves have the 0
    plain = grid_from_histogram(histogram_of(x), "max", 0.0, bits)
    assert (found - x)[x < 0].square().sum() < (plain.fake_quantize(x) - x)[x < 0].square().sum()


def test_layers_behind_a_gelu_take_its_grid_if_the_recipe_says_so():
    halves = tiny_halves(2)
    model = replace(tiny_model("vit"), precision=Precision(4, 4, gelu="twin"))
    for observer in ("max", "search"):
        found = calibrate(model, halves, Config(observer))
        twins = {quantizer for quantizer, grid in found.quantizers.items() if isinstance(grid, TwinUniform)}
        assert twins == {f"{name}:input" for name in model.layers if name.endswith("fc2")}
        assert twins


def test_a_scaled_gelu_is_refused_by_name():
    halves = tiny_halves(2)
    model = replace(tiny_model("vit"), precision=Precision(4, 4, gelu="twin"))
    model = equalise(model, halves, EqualiseConfig(exponents=(0.5,)))
    with pytest.raises(UserError, match=r"layer 'blocks\.\d\.mlp\.fc2' reads -\d.*without \[equalise\]"):
        calibrate(model, halves, Config("max"))
