"""Which branches stay. Oracle: the network run without a branch."""

import dataclasses

import pytest
import torch

from calib.images.batches import ROTATIONS, spread_images
from calib.judge.choice import BATCH, IMAGES, output_terms
from calib.judge.first_order import PROJECTIONS
from calib.judge.held_out import Candidate
from calib.network.qdq import quantized_net
from compensation.branch import DenseBranch
from compensation.leave_out import branch_terms, worth_keeping
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
    assert worth_keeping(Candidate.unfitted("", model), halves(4), {"0": 1, "1": 1}, 0.05) == (stay, [stay, stay])


def squared_error(model, images):
    with torch.no_grad():
        net = quantized_net(model)
        return sum(float((net(x) - model.float_net(x)).square().sum()) for x in images)


def test_a_branch_must_remove_its_cost_of_an_average_blocks_share():
    model, images = with_branches(share=0.05), tokens(8)
    model.branches["1"] = with_branches(share=0.02).branches["1"]
    none, both = (squared_error(each, images) for each in (dataclasses.replace(model, branches={}), model))
    gains = {}
    for name in model.branches:
        one = {other: branch for other, branch in model.branches.items() if other != name}
        gains[name] = (squared_error(dataclasses.replace(model, branches=one), images) - both) / (none / 2)
    best, cheap = max(gains, key=gains.get), min(gains, key=gains.get)
    assert gains[best] > 1.2 * gains[cheap] > 0
    judged = [half_of(tokens(8))] * 2
    for kernels in (1, 2):
        costs = {share: share * gains[cheap] / kernels for share in (0.8, 1.2)}
        adds, candidate = dict.fromkeys(model.branches, kernels), Candidate.unfitted("", model)
        assert worth_keeping(candidate, judged, adds, costs[0.8])[0] == list(model.branches)
        assert cheap not in worth_keeping(candidate, judged, adds, costs[1.2])[0]


@pytest.mark.parametrize("rotation", [0, 1])
def test_a_trial_is_tried_on_the_images_of_the_other_half_that_choose(rotation):
    fitted = [with_branches(wrong=30.0), with_branches()]  # on half 0, on half 1
    del fitted[1].branches["1"]
    candidate, both = Candidate.unchosen("", fitted, fitted[0]), halves(4)
    found = branch_terms(candidate, ["0", "1"], rotation, both)
    generator, expected = torch.Generator().manual_seed(0), []
    for model, half in zip(fitted, (both[1], both[0]), strict=True):
        part, _ = ROTATIONS[rotation]
        modules = [f"{block}.branch" for block in model.branches]
        for batch in spread_images(half.parts[part], IMAGES).split(BATCH):
            args = quantized_net(model), model.float_net, modules, batch, lambda _n, _x, z: -z, generator
            terms = output_terms(*args)
            absent = 3 - terms.shape[1]  # the branch that is not there changes nothing
            expected.append(torch.cat([terms, terms.new_zeros(len(terms), absent)], 1))
    torch.testing.assert_close(found, torch.cat(expected))
    assert bool(found[-1, 2] == 0)


def test_a_network_that_gives_no_numbers_ends_the_search():
    candidate = Candidate.unfitted("", with_branches(wrong=float("nan")))
    assert worth_keeping(candidate, halves(2), {"0": 1, "1": 1}, 0.05)[0] == ["0", "1"]
