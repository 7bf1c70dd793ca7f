"""What goes around a convolutional block, on networks whose answer is known."""

import pytest
import torch
from torch import nn

from calib.network.fold import fold_affine
from calib.quant_model import QuantModel
from tests.tiny import SIZE, tiny_model


def shortcuts(net):
    return fold_affine(QuantModel.of("own", net.eval()), torch.randn(1, 3, 16, 16)).structure.shortcuts


class Block(nn.Module):
    """y = act(conv2(act(conv1 x)) + shortcut x)."""

    def __init__(self, given, returned, stride=1, reads=nn.Identity):
        super().__init__()
        self.first, self.act = nn.Conv2d(given, returned, 3, stride, 1), nn.ReLU()
        self.second = nn.Conv2d(returned, returned, 3, 1, 1)
        self.around = nn.Conv2d(given, returned, 1, stride) if given != returned else nn.Identity()
        self.also = reads()

    def forward(self, x):
        return self.act(self.second(self.act(self.first(self.also(x)))) + self.around(x))


class Net(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 16, 3, 1, 1), nn.Sequential(*blocks)
        self.head = nn.Linear(blocks[-1].second.out_channels, 10)

    def forward(self, x):
        return self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


def test_a_block_and_a_projection():
    found = shortcuts(Net(Block(16, 16), Block(16, 16), Block(16, 24, 2)))
    # what enters the first block comes from no module: the network's own relu
    assert found == {"blocks.0": ("blocks.1.first",), "blocks.2.around": ()}


def test_a_tensor_that_something_else_reads_stays():
    assert shortcuts(Net(Block(16, 16), Block(16, 16, reads=nn.Tanh), Block(16, 16))) == {
        "blocks.1": ("blocks.2.first",)
    }


class Twice(nn.Module):
    """A block that is called twice in a row."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(self.block(x))


def test_a_module_called_twice_names_no_tensor():
    block = Block(16, 16)
    assert shortcuts(Net(block, block, Block(16, 16))) == {}
    assert [*shortcuts(Net(Twice(block), Block(16, 16)))] == ["blocks.0"]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("vit", {}),
        ("resnet", {"maxpool": ("layer1.0.conv1",), **{f"layer{i}.0.downsample.1": () for i in (2, 3, 4)}}),
    ],
)
def test_known_networks(family, expected):
    model = tiny_model(family)
    assert fold_affine(model, torch.randn(1, 3, SIZE, SIZE)).structure.shortcuts == expected


def test_mobilenet_passes_the_output_of_its_linear_layers():
    found = fold_affine(tiny_model("mobilenet"), torch.randn(1, 3, SIZE, SIZE)).structure.shortcuts
    assert found["blocks.1.0"] == ("blocks.1.1.conv_pw",)
    assert all(len(readers) == 1 for readers in found.values())
    assert len(found) == 10
