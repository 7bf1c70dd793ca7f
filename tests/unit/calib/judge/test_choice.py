"""Which changes are made. Oracles: all subsets, and the network run with a change."""

import itertools

import pytest
import torch
from torch import nn

from calib.judge.choice import least_error, output_terms
from calib.judge.first_order import PROJECTIONS


def cost(terms, costs, made):
    made = torch.tensor(made)
    t = terms[:, 0] + terms[:, 1:][:, made].sum(1)
    return float(t.square().sum() + costs[made].sum())


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_the_best_of_all_subsets_where_two_errors_cancel(seed):
    generator = torch.Generator().manual_seed(seed)
    gains = torch.randn(60, 6, generator=generator, dtype=torch.float64)
    gains[:, 3] -= 0.9 * gains[:, 1]  # what the two do cancels in part: making one alone is worse
    missing = -gains[:, 2] - gains[:, 4] + 0.3 * torch.randn(60, generator=generator, dtype=torch.float64)
    terms, costs = torch.cat([missing[:, None], gains], 1), torch.rand(6, generator=generator, dtype=torch.float64)
    found = least_error(terms, costs)
    best = min(itertools.product([True, False], repeat=6), key=lambda made: cost(terms, costs, made))
    assert tuple(found) == best
    assert found[2]
    assert found[4]


def test_a_change_that_gains_less_than_its_cost_is_not_made():
    terms = torch.cat([torch.tensor([[-1.0], [-1.0]]), torch.eye(2)], 1).double()
    assert least_error(terms, torch.tensor([0.9, 1.1], dtype=torch.float64)) == [True, False]


@pytest.mark.parametrize("inplace", [False, True])
def test_terms_are_those_of_the_network_with_a_change(inplace):
    torch.manual_seed(0)
    net, exact = (
        nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace), nn.Linear(8, 6), nn.ReLU(inplace), nn.Linear(6, 4))
        for _ in "ab"
    )
    net.requires_grad_(False)
    x, names = torch.randn(3, 5), ["0", "2", "4"]

    def change(_name, read, returned):
        return 0.001 * (read.sum(-1, keepdim=True) + returned)

    terms = output_terms(net, exact, names, x, change, torch.Generator().manual_seed(3))
    vectors = torch.randn(PROJECTIONS, 3, 4, generator=torch.Generator().manual_seed(3))

    def along(changed):
        hook = changed and net.get_submodule(changed).register_forward_hook(
            lambda _m, r, y: y + change(changed, r[0], y)
        )
        with torch.no_grad():
            found = (vectors * (exact(x) - net(x))).flatten(2).sum(2).flatten().double()
        if hook:
            hook.remove()
        return found

    torch.testing.assert_close(terms[:, 0], along(None), rtol=1e-5, atol=1e-5)
    for index, name in enumerate(names, 1):
        expected = along(name) - terms[:, 0]
        assert float((terms[:, index] - expected).norm() / expected.norm()) < 0.01


def test_without_changes_there_are_no_terms_but_the_difference():
    net, exact = (torch.nn.Linear(3, 2).requires_grad_(False) for _ in range(2))
    images = torch.randn(2, 3)
    terms = output_terms(net, exact, [], images, lambda *_: torch.zeros(1), torch.Generator())
    assert terms.shape == (2 * PROJECTIONS, 1)
