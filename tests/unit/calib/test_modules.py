"""A module that lies at several places of a network has one name, and is replaced at all of them."""

from collections import namedtuple

import pytest
from torch import nn

from calib.modules import first_names, replace_module, returned, with_returned, without_call


def shared():
    """(a network with one Linear at three places, that Linear)."""
    linear = nn.Linear(4, 4)
    return nn.Sequential(nn.ModuleDict({"a": linear}), nn.ReLU(), linear, nn.Sequential(linear)), linear


def test_every_name_of_a_module_leads_to_the_first():
    net, _ = shared()
    assert first_names(net) == {"": "", "0": "0", "0.a": "0.a", "1": "1", "2": "0.a", "3": "3", "3.0": "0.a"}


@pytest.mark.parametrize("name", ["0.a", "2", "3.0"])
def test_a_module_is_replaced_wherever_it_lies(name):
    net, linear = shared()
    new = nn.Identity()
    replace_module(net, name, new)
    assert not any(module is linear for module in net.modules())
    assert net[0]["a"] is new
    assert net[2] is new
    assert net[3][0] is new


def test_a_module_may_be_replaced_by_one_around_it():
    net, linear = shared()
    around = nn.Sequential(linear, nn.ReLU())
    replace_module(net, "2", around)
    assert net[2] is net[0]["a"] is around
    assert around[0] is linear


@pytest.mark.parametrize(("name", "own"), [("a.b@1", "a.b"), ("a@12.b", "a.b"), ("a.b", "a.b")])
def test_the_number_of_a_call_is_no_part_of_the_name(name, own):
    assert without_call(name) == own


Named = namedtuple("Named", "first second")


@pytest.mark.parametrize("output", [(1, 2), [1, 2], (1,), 1, Named(1, 2)])
def test_the_first_of_what_a_module_returns_is_read_and_replaced(output):
    assert returned(output) == 1
    changed = with_returned(output, 3)
    assert returned(changed) == 3
    assert type(changed) is type(output)
    if not isinstance(output, int):
        assert changed[1:] == output[1:]
