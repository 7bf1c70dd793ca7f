"""Rows of layers that are called several times, against two layers with the same numbers."""

import copy

import pytest
import torch
from torch import nn

from calib.network.layer_rows import input_rows
from calib.network.unit_io import readers_and_sizes


class Two(nn.Module):
    """Two layers of the same numbers, or one called twice; `other` reads what the second call reads."""

    def __init__(self, layer, twice):
        super().__init__()
        self.one, self.two = layer, layer if twice else copy.deepcopy(layer)
        self.other = copy.deepcopy(layer)

    def forward(self, x):
        y = self.one(x).sigmoid()
        return self.two(y), self.other(y)


@pytest.mark.parametrize(
    ("layer", "x"), [(nn.Linear(4, 4), torch.randn(2, 3, 4)), (nn.Conv2d(4, 4, 3, 1, 1), torch.randn(2, 4, 3, 5))]
)
def test_rows_of_all_calls_are_looked_at(layer, x):
    (twice,), (apart,) = (list(input_rows(Two(layer, is_one), names, [x], 1000)) for is_one, names in (
        (True, ["one"]), (False, ["one", "two"]),
    ))  # fmt: skip
    assert torch.equal(twice["one"], torch.cat([apart["one"], apart["two"]]))


def test_layers_share_a_quantizer_only_if_they_read_alike_in_all_calls():
    layer, x = nn.Linear(4, 4), torch.randn(2, 3, 4)
    for twice, groups in ((True, [["one"], ["other"]]), (False, [["one"], ["two", "other"]])):
        net = Two(layer, twice)
        names = ["one", "other"] if twice else ["one", "two", "other"]
        assert readers_and_sizes(net, names, lambda net=net: net(x))[0] == groups
