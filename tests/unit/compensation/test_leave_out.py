"""Which branches stay. Oracle: the network run without a branch."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from calib.judge.choice import output_terms
from calib.judge.first_order import PROJECTIONS
from calib.network.qdq import quantized_net
from compensation import qwt
from compensation.branch import DenseBranch
from compensation.leave_out import worth_keeping
from compensation.moments import Fit
from compensation.qwt import Config, compensate
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
    assert worth_keeping([model] * 2, halves(tokens(4)), [1, 1], 0.05) == stay


def opposite():
    """A chain whose second block undoes the error of the first: x + c - W x, then y + c' + W (1 - W)^-1 (y - c)."""
    model, ((weight, _), _) = planted()
    for block in model.net:
        block.linear.weight.data.zero_()  # of the exact block, too: it adds c
    first, second = model.net
    first.weight.data.copy_(weight)
    first.bias.data.zero_()
    undo = weight @ torch.linalg.inv(torch.eye(5) - weight)
    second.weight.data.copy_(-undo)
    second.bias.data.copy_(undo @ torch.tanh(first.linear.bias.data))
    return model


def test_what_is_left_out_is_what_the_output_on_other_photographs_agrees_to(monkeypatch):
    images = halves(tokens(4))
    monkeypatch.setattr(qwt, "worth_keeping", lambda *_args: [])
    found = compensate(opposite(), images, Config(forms=("dense",), min_gain_db=0.0))
    assert not found.branches
    assert "left out, for the output is as good without: 0, 1" in found.history[-1].notes
    everything = compensate(opposite(), images, Config(forms=("dense",), by_output=False, min_gain_db=-1e9))
    assert set(everything.branches) == {"0", "1"}
    needed = compensate(planted()[0], images, Config(forms=("dense",)))
    assert set(needed.branches) == set(needed.history[-1].details["kept"]) == {"0", "1"}
    assert not any("left out" in note for note in needed.history[-1].notes)


@pytest.mark.parametrize(("kernels", "after", "left_out"), [(0, 10.0, []), (1, 9.95, ["1"])])
def test_a_branch_that_costs_no_kernel_stays_unless_the_output_is_better_without(monkeypatch, kernels, after, left_out):
    kept = {name: SimpleNamespace(without=(None, None), found={"kernels": kernels}) for name in ("0", "1")}
    monkeypatch.setattr(qwt, "worth_keeping", lambda *_args: ["0"])
    monkeypatch.setattr(qwt, "sqnr_db", lambda *_args: [5.0, 10.0, 9.95])
    assert qwt._choice(planted()[0], [None, None], Config(), kept) == (5.0, after, left_out)
