"""Named inputs as one row per sample: cut, typed, and given to the network by name."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from calib.errors import UserError
from calib.images.samples import LARGEST_WHOLE
from calib.input_rows import in_order, inputs_of, join_inputs, separate_inputs, separated
from calib.inputs import Input, Inputs
from calib.structure.trace import Trace

INPUTS = Inputs(
    (
        Input("latent", "float32", (2, 3)), Input("t", "int64", ()), Input("ids", "int32", (4,)),
        Input("seen", "bool", (2,)),
    )
)  # fmt: skip
ARRAYS = {
    "latent": np.random.default_rng(0).normal(size=(3, 2, 3)).astype(np.float32),
    "t": np.array([0, 7, LARGEST_WHOLE - 1]),
    "ids": np.array([[1, 2, 3, 4], [-5, 0, LARGEST_WHOLE, -LARGEST_WHOLE], [9, 9, 9, 9]], np.int32),
    "seen": np.array([[True, False], [False, False], [True, True]]),
}
ROWS = torch.tensor(
    [[*(float(value) for name in INPUTS.names for value in np.ravel(ARRAYS[name][row]))] for row in range(3)]
)


class Taking(nn.Module):
    """Keeps what it is given; its output depends on all of it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, latent, t, ids, seen):
        self.given = {"latent": latent, "t": t, "ids": ids, "seen": seen}
        return self.layer(latent).mean(1) + t[:, None] + ids.sum(1, keepdim=True) + seen.float()


def joined():
    net = Taking().eval()
    join_inputs(net, INPUTS)
    return net


def test_a_row_is_cut_into_the_arrays_it_was_made_of():
    for name, value in separated(INPUTS, ROWS).items():
        assert value.numpy().dtype == ARRAYS[name].dtype
        np.testing.assert_array_equal(value.numpy(), ARRAYS[name])


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_floating_inputs_keep_the_type_of_the_rows_and_whole_numbers_their_own(kind):
    found = separated(INPUTS, ROWS.to(kind))
    assert [value.dtype for value in found.values()] == [kind, torch.int64, torch.int32, torch.bool]
    np.testing.assert_array_equal(found["ids"].numpy(), ARRAYS["ids"])


def test_the_network_takes_rows_and_named_inputs_alike():
    net = joined()
    named = {name: torch.from_numpy(array) for name, array in ARRAYS.items()}
    assert torch.equal(net(ROWS), net(**named))
    assert torch.equal(net(ROWS), Taking.forward(net, **named))
    assert [value.dtype for value in net.given.values()] == [each.dtype for each in named.values()]


def test_a_copy_takes_rows_too():
    assert torch.equal(copy.deepcopy(net := joined())(ROWS), net(ROWS))


def test_a_network_of_images_is_given_what_it_is_called_with():
    net = nn.Conv2d(3, 4, 1)
    images = torch.zeros(2, 3, 4, 4)
    assert inputs_of(net) is None
    assert separate_inputs(net, images) is images
    assert inputs_of(joined()) == INPUTS


def test_a_trace_has_the_inputs_and_the_names_of_modules_of_the_network_itself():
    trace = Trace(joined(), ROWS[:1])
    given = [node.name for node in trace.nodes if node.op == "placeholder" and node.name not in trace.parameters]
    assert given == [*INPUTS.names]
    assert "layer" in trace.owned


def inputs(*names):
    return Inputs(tuple(Input(name, "float32", (2,)) for name in names))


class Options(nn.Module):
    def forward(self, ids, mask=None, **more):
        return ids if mask is None else ids * mask, more


def test_inputs_come_in_the_order_of_the_forward_pass():
    assert in_order(Taking(), inputs("seen", "t", "ids", "latent")).names == ("latent", "t", "ids", "seen")
    assert in_order(Options(), inputs("x", "mask", "ids")).names == ("ids", "mask", "x")
    assert in_order(Options(), inputs("ids")).names == ("ids",)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("latent", "t", "idz", "seen"), r"takes no input 'idz': .*\(latent, t, ids, seen\).*ids"),
        (("latent", "t", "ids"), "needs an input 'seen', and there is no such array"),
    ],
)
def test_other_names_are_refused(names, message):
    with pytest.raises(UserError, match=message):
        in_order(Taking(), inputs(*names))
