"""The stages compute on another device what they compute on the CPU."""

import contextlib
import functools
import re

import pytest
import torch
from torch import nn

from calib.device import CPU, chosen_device
from calib.errors import UserError
from calib.images.batches import Half, Part
from calib.network.qdq import quantized_net
from calib.quant_model import QuantModel
from deploy.recipe import recipe_from_tables
from deploy.stages import CalibrationImages, Simulator
from tests.other_device import OTHER, other_device
from tests.tiny import tiny_batches, tiny_model

pytestmark = pytest.mark.slow

RECIPES = {
    "rtn": {"method": {"name": "rtn", "bias_correction": True}},
    "branches": {"method": {"name": "rtn", "bias_correction": True}, "compensate": {"min_r2_per_kernel": 0.0}},
    "trained branches": {
        "method": {"name": "rtn", "bias_correction": True}, "compensate": {"min_r2_per_kernel": 0.0},
        "finetune": {"batch": 4},
    },
    "attention": {"method": {"name": "rtn", "bias_correction": True}, "attention": {}},
    "erq": {"method": {"name": "erq"}},
    "gptq": {"method": {"name": "gptq"}},
    "adaq": {"method": {"name": "adaq"}},
    "adaround": {"method": {"name": "adaround", "iterations": 3, "images": 8, "drop": 0.5}},
}  # fmt: skip


# Sums in another order change single integers, as between two processors: at most this share of the noise of rounding.
SHARE_OF_NOISE = 0.25


class Block(nn.Module):
    """A depthwise and a plain convolution beside a shortcut."""

    def __init__(self):
        super().__init__()
        self.depthwise = nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False)
        self.bn, self.act, self.plain = nn.BatchNorm2d(16), nn.ReLU6(), nn.Conv2d(16, 16, 1)

    def forward(self, x):
        return x + self.plain(self.act(self.bn(self.depthwise(x))))


class Maps(nn.Module):
    """A small convolutional classifier."""

    num_classes = 10

    def __init__(self):
        super().__init__()
        self.stem, self.blocks, self.head = (
            nn.Conv2d(3, 16, 3, 4, 1),
            nn.Sequential(Block(), Block()),
            nn.Linear(16, 10),
        )

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def network(family):
    if family == "vit":
        return tiny_model("vit")
    torch.manual_seed(0)
    return QuantModel.of("maps", Maps().eval().requires_grad_(False))


@functools.cache
def simulator(family, device):
    """One for all recipes, which share the stages that they begin with."""
    batches = [batch.to(device) for batch in tiny_batches(4)]
    halves = [Half((Part(batches[half : half + 1]), Part(batches[half + 1 : half + 2]))) for half in (0, 2)]
    return Simulator(network(family), CalibrationImages(tiny_batches(1)[0][:1], halves, device=device))


def simulated(family, recipe, device):
    with contextlib.nullcontext() if device == CPU else other_device():
        model = simulator(family, device).run(recipe_from_tables(recipe, {"equalise": {}, **RECIPES[recipe]}, "test"))
        assert model.device == device
        return model.to(CPU)


def said(record):
    """The notes of a stage without the digits of decibels and shares, which sums in another order change."""
    return [re.sub(r"-?\d+\.\d+", "#", note) for note in record.notes]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ["maps", "vit"])
def test_every_stage_computes_on_another_device(family, recipe):
    if recipe == "attention" and family != "vit":
        pytest.skip("no attention")
    exact, found = (simulated(family, recipe, device) for device in (CPU, OTHER))
    assert found.branches.keys() == exact.branches.keys()
    assert found.quantizers.keys() == exact.quantizers.keys()
    assert [said(record) for record in found.history] == [said(record) for record in exact.history]
    x = tiny_batches(1)[0]
    with torch.no_grad():
        y, other, reference = quantized_net(exact)(x), quantized_net(found)(x), exact.float_net(x)
    assert float((other - y).norm()) <= SHARE_OF_NOISE * float((reference - y).norm())


def test_the_other_device_refuses_tensors_of_the_cpu():
    with other_device() as device, pytest.raises(RuntimeError, match="two devices"):
        torch.ones(2).to(device) + torch.ones(2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_where_there_is_no_gpu_auto_is_the_cpu():
    assert chosen_device("auto") == CPU
    for name in ("cuda", "cuda:0", "cuda:3"):
        with pytest.raises(UserError, match=f"DEVICE='{name}': torch .* finds 0 CUDA devices"):
            chosen_device(name)


@pytest.mark.parametrize("name", ["gpu", "", "auto:1", "cuda:", "cuda:-1", "CPU"])
def test_other_names_are_refused(name):
    with pytest.raises(UserError, match="expected auto, cpu, cuda or cuda:1"):
        chosen_device(name)
