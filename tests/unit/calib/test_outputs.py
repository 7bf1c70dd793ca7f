"""Outputs by name, and joined to one row per image."""

import copy
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from calib.errors import UserError
from calib.outputs import (
    OUTPUT,
    checked_outputs,
    join_outputs,
    named_outputs,
    outputs_of,
    require_function_of_each,
    separate_outputs,
    task_of,
)
from calib.structure.trace import Trace

Pair = namedtuple("Pair", "boxes scores")


@dataclass
class Plain:
    logits: torch.Tensor


ONE, TWO = torch.ones(2, 3), torch.zeros(2, 4)
RETURNED = {
    "a tensor": (ONE, [OUTPUT]),
    "a tuple": ((ONE, TWO), ["output_0", "output_1"]),
    "a list": ([ONE, TWO], ["output_0", "output_1"]),
    "a dictionary": ({"logits": ONE, "boxes": TWO}, ["logits", "boxes"]),
    "a dictionary of one": ({"logits": ONE}, ["logits"]),
    "a named tuple": (Pair(ONE, TWO), ["boxes", "scores"]),
    "levels": ({"scores": [ONE, TWO], "aux": None}, ["scores_0", "scores_1"]),
    "odd keys": ({"a.b/c": ONE}, ["a_b_c"]),
    "nothing": (None, []),
}


@pytest.mark.parametrize("case", RETURNED)
def test_names(case):
    returned, names = RETURNED[case]
    assert list(named_outputs(returned)) == names


def test_two_outputs_of_one_name_are_refused():
    with pytest.raises(UserError, match="two outputs named 'a_0'"):
        named_outputs({"a": [ONE], "a_0": TWO})


class Returning(nn.Module):
    """Returns what `make` makes of the images."""

    def __init__(self, make, num_classes=None):
        super().__init__()
        self.make = make
        if num_classes is not None:
            self.num_classes = num_classes

    def forward(self, images):
        return self.make(images)


IMAGES = torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
REFUSED = {
    "no tensor": (lambda _: {"a": 1}, "without tensors"),
    "integers": (lambda x: x.argmax(1), "int64 numbers as 'output'"),
    "a scalar per batch": (lambda x: x.mean(), r"shape \(\) for 2 images"),
    "batch not first": (lambda x: x.flatten(1).T, r"shape \(48, 2\) for 2 images"),
    "one value per image": (lambda x: x.flatten(1).sum(1), r"shape \(2,\) for 2 images"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_judged_is_refused(case):
    make, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        outputs_of(Returning(make), IMAGES)


def test_tasks():
    def task(make, classes=None):
        net = Returning(make, classes)
        return task_of(net, outputs_of(net, IMAGES)).name

    assert task(lambda x: x.flatten(1), 48) == "classifier"
    assert task(lambda x: x.flatten(1), 0) == "features"
    assert task(lambda x: x.flatten(1)) == "features"
    assert task(lambda x: x, 3) == "values"
    assert task(lambda x: (x.flatten(1), x.flatten(1)), 48) == "values"


@pytest.mark.parametrize(
    ("attribute", "make", "expected"),
    [
        ("returns_tokens", lambda x: x.flatten(2), "tokens"),
        ("returns_pictures", lambda x: x, "pictures"),
        (
            "returns_tokens",
            lambda x: x,
            r"returns_tokens is set: expected one output \(B, T, vocabulary\), it returns output ",
        ),
        ("returns_tokens", lambda x: x.flatten(1), r"it returns output \(B, 48\)"),
        (
            "returns_pictures",
            lambda x: (x, x),
            r"expected one output \(B, 3, H, W\), it returns output_0 .*, output_1 ",
        ),
    ],
)
def test_what_a_network_says_of_its_outputs_has_to_fit_them(attribute, make, expected):
    net = Returning(make)
    setattr(net, attribute, True)
    outputs = outputs_of(net, IMAGES)
    if "returns" not in expected:
        assert task_of(net, outputs).name == expected
        return
    with pytest.raises(UserError, match=expected):
        task_of(net, outputs)


@pytest.mark.parametrize("said", ["no", 1, "True"])
def test_what_a_network_says_of_its_outputs_is_true_or_false(said):
    net = Returning(lambda x: x)
    net.returns_pictures = said
    with pytest.raises(UserError, match=f"returns_pictures is {said!r}: expected True or False"):
        task_of(net, outputs_of(net, IMAGES))
    net.returns_pictures = False
    assert task_of(net, outputs_of(net, IMAGES)).name == "values"


def test_a_network_with_one_row_per_image_stays_as_it_is():
    net = Returning(lambda x: x.flatten(1))
    join_outputs(net, IMAGES)
    with separate_outputs(net):
        assert net(IMAGES).shape == (2, 48)


def test_several_outputs_are_joined_by_their_sizes():
    net = Returning(lambda x: {"big": 1000 * x, "small": x[:, 0], "nothing": 0 * x[:, :1]})
    join_outputs(net, IMAGES)
    rows = net(IMAGES)
    assert rows.shape == (2, 48 + 16 + 16)
    for part in (rows[:, :48], rows[:, 48:64]):
        assert float(part.square().mean()) == pytest.approx(1, rel=1e-6)
    assert not rows[:, 64:].any()
    with separate_outputs(net):
        assert list(net(IMAGES)) == ["big", "small", "nothing"]
    assert net(IMAGES).shape == rows.shape


def test_a_copy_joins_and_separates_by_itself():
    net = Returning(lambda x: (x, x[:, 0]))
    join_outputs(net, IMAGES)
    copied = copy.deepcopy(net)
    with separate_outputs(copied):
        assert isinstance(copied(IMAGES), dict)
        assert net(IMAGES).shape == (2, 48 + 16)


def test_modules_keep_their_names():
    net = nn.Sequential(nn.Conv2d(3, 4, 1))
    join_outputs(net, IMAGES)
    assert [name for name, _ in Trace(net, IMAGES[:1]).net.named_modules()] == ["", "0"]


class Together(nn.Module):
    """Outputs that are other for an image beside others."""

    def forward(self, x):
        y = x.mean((2, 3))
        return y - y.mean(0, keepdim=True)


class Random(nn.Module):
    """Dropout that does not know of eval mode."""

    def forward(self, x):
        return nn.functional.dropout(x.mean((2, 3)), 0.5, training=True)


class OneOnly(nn.Module):
    """Code that needs two images."""

    def forward(self, x):
        return torch.stack([x[0], x[1]]).mean((2, 3)) if len(x) == 2 else x[1]


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Together(), "another 'output' for one sample alone"),
        (Random(), "another 'output' when it runs on the same images again"),
        (OneOnly(), "fails on one sample alone .IndexError"),
    ],
)
def test_what_is_no_function_of_each_image_is_refused(net, message):
    with pytest.raises(UserError, match=message):
        require_function_of_each(net.eval(), torch.rand(2, 8, 4, 4))


def test_a_function_of_each_image_is_taken():
    require_function_of_each(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval(), torch.rand(2, 3, 8, 8))


@dataclass
class Both:
    """What torch knows nothing of."""

    first: torch.Tensor
    second: dict


class ReturnsDataclass(nn.Module):
    def forward(self, x):
        y = x.mean((2, 3))
        return Both(y, {"deep": y * 2})


def test_fields_of_a_plain_dataclass_are_outputs():
    assert list(checked_outputs(ReturnsDataclass(), torch.rand(2, 8, 4, 4))) == ["first", "second_deep"]


@dataclass
class OnlyTraced:
    """A dataclass that nothing but a trace sees."""

    first: torch.Tensor


class ReturnsAnother(nn.Module):
    def forward(self, x):
        return OnlyTraced(x.mean((2, 3)))


def test_a_network_that_returns_a_plain_dataclass_is_traced_without_a_run_before():
    assert Trace(ReturnsAnother(), torch.rand(1, 8, 4, 4)).nodes


def test_outputs_in_float64_are_refused_when_the_network_is_loaded():
    class Doubles(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)).double()

    with pytest.raises(UserError, match="returns float64 as 'output': expected float32"):
        checked_outputs(Doubles(), torch.rand(2, 8, 4, 4))
