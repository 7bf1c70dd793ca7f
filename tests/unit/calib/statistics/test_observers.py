import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.statistics.entropy import linear_counts
from calib.statistics.observers import OBSERVERS, Histogram, amax_from_histogram, max_amax, mse_amax, percentile_amax

BIN_WIDTH = 2**-9  # relative: 512 bins an octave


def histogram_of(*parts: torch.Tensor) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.update(part)
    return histogram


def heavy_tailed(count: int = 20_000, seed: int = 0) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.standard_t(3, count).astype(np.float32))


def mse_by_hand(x: np.ndarray, amax: float) -> float:
    scale = amax / 127
    return float(((np.clip(np.round(x / scale), -127, 127) * scale - x) ** 2).mean())


@given(st.permutations(range(6)), st.integers(1, 3000))
@settings(max_examples=15, deadline=None)
def test_any_order_and_any_split_give_bit_identical_statistics(order, batch):
    x = heavy_tailed(6000)
    whole = histogram_of(x)
    shuffled = torch.cat([x.split(1000)[i] for i in order])
    parts = histogram_of(*shuffled.split(batch))
    assert torch.equal(whole.counts, parts.counts)
    assert whole.amax == parts.amax


def test_merging_equals_seeing_everything_and_is_associative():
    a, b, c = (histogram_of(heavy_tailed(seed=seed)) for seed in range(3))
    left, right = a.merge(b).merge(c), a.merge(b.merge(c))
    whole = histogram_of(*(heavy_tailed(seed=seed) for seed in range(3)))
    assert torch.equal(left.counts, right.counts)
    assert torch.equal(left.counts, whole.counts)
    assert left.amax == right.amax == whole.amax


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0, 99.9])
def test_percentile_is_the_sorted_element_within_a_bin(percentile):
    x = heavy_tailed()
    exact = np.sort(x.abs().numpy())[math.ceil(Fraction(str(percentile)) / 100 * len(x)) - 1]
    assert percentile_amax(histogram_of(x), percentile) == pytest.approx(exact, rel=2 * BIN_WIDTH)
    assert percentile_amax(histogram_of(x), percentile) >= exact


def test_all_elements_are_below_the_hundredth_percentile():
    x = heavy_tailed()
    assert percentile_amax(histogram_of(x), 100.0) == max_amax(histogram_of(x)) == float(x.abs().max())


def test_mse_threshold_is_as_good_as_the_best_of_an_exhaustive_search():
    x = heavy_tailed()
    best = min(mse_by_hand(x.numpy(), float(x.abs().max()) * f) for f in np.linspace(0.02, 1, 99))
    chosen = mse_by_hand(x.numpy(), mse_amax(histogram_of(x)))
    assert chosen <= best * 1.02
    assert chosen < mse_by_hand(x.numpy(), float(x.abs().max()))


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("factor", [2.0**-7, 2.0, 64.0])
def test_scaling_the_data_scales_the_threshold(observer, factor):
    x = heavy_tailed()
    once = amax_from_histogram(histogram_of(x), observer, 99.9)
    assert amax_from_histogram(histogram_of(x * factor), observer, 99.9) == pytest.approx(once * factor, rel=1e-6)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_tensor_of_zeros_has_threshold_zero(observer):
    assert amax_from_histogram(histogram_of(torch.zeros(100)), observer, 99.9) == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_refused(bad):
    with pytest.raises(ValueError, match="NaN or Inf"):
        histogram_of(torch.tensor([1.0, bad]))


def test_memory_does_not_grow_with_the_data():
    histogram = Histogram()
    size = histogram.counts.numel()
    for seed in range(20):
        histogram.update(heavy_tailed(seed=seed) * 10.0**seed)
    assert histogram.counts.numel() == size
    assert int(histogram.counts.sum()) == 20 * 20_000


def entropy_by_the_book(x, bins=2048, levels=128, step=16):
    """The calibrator written with numpy's histogram and plain loops."""
    counts, edges = np.histogram(np.abs(x), bins=bins, range=(0, np.abs(x).max()))
    counts = counts.astype(float)
    counts[0] = counts[1]
    best, threshold = np.inf, edges[-1]
    for kept in range(bins, levels - 1, -step):
        p = counts[:kept].copy()
        p[-1] += counts[kept:].sum()
        q = np.zeros(kept)
        for inside in np.split(np.arange(kept), np.flatnonzero(np.diff(np.arange(kept) * levels // kept)) + 1):
            inside = inside[counts[inside] > 0]
            q[inside] = counts[inside].mean() if len(inside) else 0
        p, q = p / p.sum(), q / q.sum()
        divergence = np.inf if (q[p > 0] == 0).any() else float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())
        if divergence < best:
            best, threshold = divergence, edges[kept]
    return threshold


def test_entropy_is_that_of_the_plain_loops():
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) ** 3
    histogram = Histogram()
    histogram.update(x)
    expected = entropy_by_the_book(x.numpy())
    assert amax_from_histogram(histogram, "entropy", 0) == pytest.approx(expected, rel=0.03)
    assert expected < 0.8 * histogram.amax


def test_entropy_of_a_uniform_tensor_is_its_range():
    histogram = Histogram()
    histogram.update(torch.linspace(-1, 1, 1_000_001))
    assert amax_from_histogram(histogram, "entropy", 0) == pytest.approx(1.0, rel=0.01)


def test_entropy_of_zeros_is_zero():
    histogram = Histogram()
    histogram.update(torch.zeros(10))
    assert amax_from_histogram(histogram, "entropy", 0) == 0.0


def test_linear_counts_keep_every_element():
    x = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    histogram = Histogram()
    histogram.update(x)
    counts = linear_counts(*histogram.populated(), histogram.amax, bins=64)
    assert float(counts.sum()) == pytest.approx(10_000, rel=1e-9)
    expected = np.histogram(x.numpy(), bins=64, range=(0, histogram.amax))[0]
    assert np.abs(counts.numpy() - expected).max() < 12  # a bin of the histogram may straddle an edge
