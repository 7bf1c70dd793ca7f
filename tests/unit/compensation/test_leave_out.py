"""Which branches stay. Oracle: the network run without a branch."""

import dataclasses

import pytest
import torch

from calib.images.batches import Half, Part
from calib.judge.choice import output_terms
from calib.judge.first_order import PROJECTIONS
from calib.network.qdq import quantized_net
from compensation.branch import DenseBranch
from compensation.leave_out import worth_keeping
from compensation.moments import Fit
from tests.tiny import half_of
from tests.unit.compensation.test_qwt import halves, planted, tokens


def with_branches(share=1.0, wrong=0.0):
    """The planted chain with its branches, times `share`; the second returns too much by `wrong`."""
    model, maps = planted()
    branches = {
        str(index): DenseBranch(Fit(share * weight.double(), share * bias.double() + wrong * index))
        for index, (weight, bias) in enumerate(maps)
    }
    return dataclasses.replace(model, branches=branches)


def test_terms_are_those_of_the_network_without_a_branch():
    model, images = with_branches(share=0.01), tokens(1)[0]
    blocks = list(model.branches)
    modules, generator = [f"{block}.branch" for block in blocks], torch.Generator().manual_seed(3)
    terms = output_terms(quantized_net(model), model.float_net, modules, images, lambda _n, _x, z: -z, generator)
    vectors = torch.randn(PROJECTIONS, *images.shape, generator=torch.Generator().manual_seed(3))

    def along(net):
        with torch.no_grad():
            return (vectors * (model.float_net(images) - net(images))).flatten(2).sum(2).flatten().double()

    torch.testing.assert_close(terms[:, 0], along(quantized_net(model)), rtol=1e-5, atol=1e-5)
    for index, block in enumerate(blocks, 1):
        others = {name: branch for name, branch in model.branches.items() if name != block}
        without = along(quantized_net(dataclasses.replace(model, branches=others)))
        change = without - terms[:, 0]
        assert float((terms[:, index] - change).norm() / change.norm()) < 0.02  # branches of 1 %, to first order


@pytest.mark.parametrize(("wrong", "stay"), [(0.0, ["0", "1"]), (30.0, ["0"])])
def test_a_branch_that_harms_the_output_is_left_out(wrong, stay):
    model = with_branches(wrong=wrong)
    assert worth_keeping([model] * 2, halves(4), [1, 1], 0.05) == stay


def squared_error(model, images):
    with torch.no_grad():
        net = quantized_net(model)
        return sum(float((net(x) - model.float_net(x)).square().sum()) for x in images)


def test_a_branch_must_remove_its_price_of_an_average_blocks_share():
    model, images = with_branches(share=0.05), tokens(8)
    model.branches["1"] = with_branches(share=0.02).branches["1"]
    none, both = (squared_error(each, images) for each in (dataclasses.replace(model, branches={}), model))
    gains = {}
    for name in model.branches:
        one = {other: branch for other, branch in model.branches.items() if other != name}
        gains[name] = (squared_error(dataclasses.replace(model, branches=one), images) - both) / (none / 2)
    dear, cheap = max(gains, key=gains.get), min(gains, key=gains.get)
    assert gains[dear] > 1.2 * gains[cheap] > 0
    judged = [half_of(tokens(8))] * 2
    for kernels in (1, 2):
        prices = {share: share * gains[cheap] / kernels for share in (0.8, 1.2)}
        assert worth_keeping([model] * 2, judged, [kernels] * 2, prices[0.8]) == list(model.branches)
        assert cheap not in worth_keeping([model] * 2, judged, [kernels] * 2, prices[1.2])


@pytest.mark.parametrize("harmful", [0, 1])
def test_what_was_fitted_on_a_half_is_tried_on_the_images_of_the_other_that_choose(harmful):
    nothing = Part([torch.full_like(tokens(1)[0], float("nan"))])
    model = with_branches(wrong=30.0)
    by_half = [model if index == harmful else None for index in range(2)]
    both = [Half(nothing if index == harmful else Part(tokens(2)), nothing) for index in range(2)]
    assert worth_keeping(by_half, both, [0, 0], 0.0) == ["0"]


def test_a_network_that_gives_no_numbers_ends_the_search():
    model = with_branches(wrong=float("nan"))
    assert worth_keeping([model] * 2, halves(2), [1, 1], 0.05) == ["0", "1"]
