"""Oracle: least squares on the stored samples (numpy.linalg.lstsq, or torch's with the ridge written out as extra rows)."""

import numpy as np
import pytest
import torch

from compensation.moments import Fit, Moments, pooled, r2

D_IN, D_OUT, COUNT = 6, 3, 400


def samples(count=COUNT, noise=0.1, mean=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, D_IN, generator=generator, dtype=torch.float64) + mean
    weight = torch.randn(D_OUT, D_IN, generator=generator, dtype=torch.float64)
    bias = torch.randn(D_OUT, generator=generator, dtype=torch.float64)
    return x, x @ weight.t() + bias + noise * torch.randn(count, D_OUT, generator=generator, dtype=torch.float64)


def moments_of(x, r, chunk=COUNT):
    moments = Moments(x.shape[1], r.shape[1])
    for start in range(0, len(x), chunk):
        moments.update(x[start : start + chunk], r[start : start + chunk])
    return moments


def lstsq(x, r):
    """(W, b)."""
    x, r = x.double().numpy(), r.double().numpy()
    found = np.linalg.lstsq(np.c_[x, np.ones(len(x))], r, rcond=None)[0]
    return torch.from_numpy(found[:-1].T.copy()), torch.from_numpy(found[-1])


def stored_sse(x, r, weight, bias):
    return float((r - x @ weight.t() - bias).square().sum())


@pytest.mark.parametrize("chunk", [1, 7, 64, COUNT])
@pytest.mark.parametrize("mean", [0.0, 50.0])
def test_any_chunking_gives_least_squares_on_the_stored_samples(chunk, mean):
    x, r = samples(mean=mean)
    found, (weight, bias) = moments_of(x, r, chunk).solve(), lstsq(x, r)
    torch.testing.assert_close(found.weight, weight, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.bias, bias, rtol=1e-8, atol=1e-8)
    assert found.ridge == 0


def test_order_and_a_common_shift_of_x_do_not_change_the_weights():
    x, r = samples()
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(1))
    plain, shuffled = moments_of(x, r).solve(), moments_of(x[order], r[order], 11).solve()
    moved = moments_of(x + 1000, r, 11).solve()
    for other in (shuffled, moved):
        torch.testing.assert_close(other.weight, plain.weight, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(moved.bias, plain.bias - 1000 * plain.weight.sum(1), rtol=1e-8, atol=1e-5)


def test_merged_sums_with_differing_shifts_are_those_of_all_samples():
    x, r = samples()
    x[200:] += 3  # so that the shifts of the parts differ
    parts = [moments_of(part, of_r) for part, of_r in zip(x.split(100), r.split(100), strict=True)]
    together = pooled([Moments(D_IN, D_OUT), *parts])
    assert together.count == COUNT
    assert torch.equal(together.shift, parts[0].shift)
    assert together.total() == pytest.approx(float((r - r.mean(0)).square().sum()), rel=1e-12)
    wrong = torch.ones(D_OUT, D_IN).double(), torch.ones(D_OUT).double()
    assert together.sse(*wrong) == pytest.approx(stored_sse(x, r, *wrong), rel=1e-12)
    torch.testing.assert_close(together.solve().weight, lstsq(x, r)[0], rtol=1e-9, atol=1e-10)
    assert parts[0].count == 100  # unchanged


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_a_ridge_on_channels_of_unit_power_is_that_of_scaled_stored_samples(ridge):
    x, r = samples()
    x = (x - x[:9].mean(0)) * torch.logspace(-1, 1, D_IN)  # 9: the samples that the shift is the mean of
    found = moments_of(x, r, 9).solve(ridge=ridge)
    power = (x - x[:9].mean(0)).square().sum(0).sqrt()
    design = torch.cat(((x - x[:9].mean(0)) / power, torch.ones(len(x), 1) / len(x) ** 0.5), 1).double()
    penalty = torch.cat((ridge**0.5 * torch.eye(D_IN), torch.zeros(D_IN, 1)), 1).double()
    stacked = torch.cat((design, penalty)), torch.cat((r, torch.zeros(D_IN, r.shape[1]))).double()
    expected = torch.linalg.lstsq(*stacked).solution[:-1].T / power
    torch.testing.assert_close(found.weight, expected.double(), rtol=1e-6, atol=1e-12)
    assert found.ridge == ridge


def test_duplicated_samples_do_not_change_a_ridge_fit():
    x, r = samples()
    once, twice = moments_of(x, r).solve(0.1), moments_of(torch.cat((x, x)), torch.cat((r, r))).solve(0.1)
    torch.testing.assert_close(once.weight, twice.weight, rtol=1e-10, atol=1e-12)


def test_error_and_r2_of_any_weights_are_those_of_the_stored_samples():
    x, r = samples(mean=2)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(D_OUT, D_IN, generator=generator, dtype=torch.float64)
    bias = torch.randn(D_OUT, generator=generator, dtype=torch.float64)
    moments, expected = moments_of(x, r, 13), stored_sse(x, r, weight, bias)
    assert moments.sse(weight, bias) == pytest.approx(expected, rel=1e-12)
    total = float((r - r.mean(0)).square().sum())
    assert moments.total() == pytest.approx(total, rel=1e-12)
    assert r2([moments], [Fit(weight, bias)]) == pytest.approx(1 - expected / total, rel=1e-12)


def ill_conditioned(count=4000, d=32):
    """Float32 samples: channel means 50, singular values 1 .. 1e-4, a weak linear signal."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    x = torch.randn(count, d, generator=generator, dtype=torch.float64) * torch.logspace(0, -4, d) @ basis + 50
    noise = torch.randn(count, D_OUT, generator=generator, dtype=torch.float64)
    r = (x - 50) @ torch.randn(d, D_OUT, generator=generator, dtype=torch.float64) + noise
    return x.float(), r.float()


def test_an_ill_conditioned_problem_is_solved_where_a_float32_inverse_is_not():
    x, r = ill_conditioned()
    moments = moments_of(x, r, 128)
    weight, bias = lstsq(x, r)
    best = 1 - stored_sse(x.double(), r.double(), weight, bias) / moments.total()
    found = moments.solve()
    assert r2([moments], [found]) == pytest.approx(best, abs=1e-6)
    ones = torch.cat((x, torch.ones(len(x), 1)), 1)
    naive = (torch.inverse(ones.t() @ ones) @ ones.t() @ r).t()
    assert r2([moments], [Fit(naive[:, :-1], naive[:, -1])]) < best - 1e-2


@pytest.mark.parametrize("value", [0.0, 50.1], ids=["dead", "constant"])
def test_a_channel_that_does_not_vary_gets_weight_zero(value):
    x, r = samples()
    x[:, 2] = value  # 50.1: the mean of seven is not 50.1 in float64
    found = moments_of(x, r, 7).solve()
    others = [0, 1, 3, 4, 5]
    assert not found.weight[:, 2].any()
    assert found.ridge == 0
    torch.testing.assert_close(found.weight[:, others], lstsq(x[:, others], r)[0], rtol=1e-8, atol=1e-9)


def test_duplicated_channels_take_a_ridge_and_share_the_weight():
    x, r = samples()
    single = moments_of(x, r).solve()
    doubled = moments_of(torch.cat((x, x[:, :1]), 1), r).solve()
    assert doubled.ridge > 0
    torch.testing.assert_close(doubled.weight[:, 0], doubled.weight[:, -1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(doubled.weight[:, 0] * 2, single.weight[:, 0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_a_dependent_channel_takes_a_ridge_even_where_the_factorisation_goes_through_by_luck(seed):
    x, r = samples(noise=1.0)
    mix = torch.randn(2, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    wide, r = torch.cat((x, x[:, :2] @ mix), 1), r + 1000
    found = moments_of(wide, r).solve()
    residual = r - wide @ found.weight.t() - found.bias
    assert found.ridge > 0
    assert float(residual.mean(0).abs().max()) < 1e-8  # a ridge of 1e-8 on the bias would leave 1e-5
    assert float(residual.square().sum()) == pytest.approx(stored_sse(x, r, *lstsq(x, r)), rel=1e-6)


def test_weights_that_fp16_cannot_hold_are_refused():
    x, r = samples()
    x[:, 0] *= 1e-9
    with pytest.raises(torch.linalg.LinAlgError, match="weights below 1000"):
        moments_of(x, r).solve()


def test_no_samples_is_an_error():
    with pytest.raises(ValueError, match="no samples"):
        Moments(2, 2).solve()


@pytest.mark.parametrize("ridge", [0.0, 0.1])
@pytest.mark.parametrize("noise", [0.0, 1.0, 100.0])
def test_training_r2_is_never_negative(noise, ridge):
    moments = moments_of(*samples(noise=noise))
    found = moments.solve(ridge)
    assert r2([moments], [found]) >= -1e-12  # round-off of the quadratic form


def test_errors_and_variances_of_groups_add_up_before_they_are_divided():
    (x, r), (x2, r2_) = samples(noise=2.0), samples(noise=0.1, seed=1)
    fit, constant = Fit(*lstsq(x, r)), Fit(torch.zeros(D_OUT, D_IN), r2_.mean(0))
    total, unexplained = (float((each - each.mean(0)).square().sum()) for each in (r, r2_))
    expected = 1 - (stored_sse(x, r, *fit[:2]) + unexplained) / (total + unexplained)
    assert r2([moments_of(x, r), moments_of(x2, r2_)], [fit, constant]) == pytest.approx(expected, rel=1e-9)
