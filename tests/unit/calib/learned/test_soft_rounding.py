import itertools

import pytest
import torch
from torch import nn

from calib.learned.soft_rounding import alpha_of, beta_at, hard_rounding, soft_rounding, undecided
from calib.learned.weight_scales import least_squares_qparams


def test_h_starts_as_the_fractional_part():
    share = torch.linspace(0, 0.9999, 1000)
    torch.testing.assert_close(soft_rounding(alpha_of(share)), share, rtol=0, atol=1e-6)


def test_h_reaches_0_and_1():
    h = soft_rounding(torch.tensor([-3.0, 3.0]))
    assert h.tolist() == [0, 1]


@pytest.mark.parametrize(("progress", "beta"), [(0.0, None), (0.19, None), (0.2, 20.0), (0.6, 11.0), (1.0, 2.0)])
def test_beta_waits_and_then_falls_linearly(progress, beta):
    assert beta_at(progress) == (None if beta is None else pytest.approx(beta))


def test_the_regulariser_counts_what_is_undecided():
    assert undecided(torch.tensor([0.0, 1.0, 1.0]), 3.0) == 0
    assert undecided(torch.tensor([0.5, 0.0, 0.25]), 2.0) == pytest.approx(1 + 0.75)


@pytest.mark.parametrize("beta", [2.0, 20.0])
def test_the_regulariser_pushes_away_from_the_middle(beta):
    alpha = torch.tensor([-1.0, 1.0], requires_grad=True)
    undecided(soft_rounding(alpha), beta).backward()
    assert alpha.grad[0] > 0 > alpha.grad[1]  # descent moves alpha against it


def test_hard_rounding_takes_the_nearer():
    share = torch.tensor([0.0, 0.3, 0.499, 0.501, 0.9])
    assert hard_rounding(alpha_of(share)).tolist() == [0, 0, 0, 1, 1]


def test_least_squares_steps_beat_all_others_of_a_grid():
    torch.manual_seed(0)
    weight = nn.Conv2d(6, 5, 3).weight.detach()
    params = least_squares_qparams(weight, 3)
    rows = weight.flatten(1)
    least = (params.fake_quantize(rows) - rows).square().sum(1)
    for channel, factor in itertools.product(range(5), (0.5, 0.8, 0.9, 1.1, 1.3)):
        step = params.scale[channel] * factor
        other = (torch.round(rows[channel] / step).clamp(-3, 3) * step - rows[channel]).square().sum()
        assert least[channel] <= other * 1.02  # the search steps by 1 %
