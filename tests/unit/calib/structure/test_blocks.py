"""Which modules a branch can stand beside, of networks whose residual sums lie in modules of several tensors, or nowhere."""

import torch
from torch import nn

from calib.network.fold import fold_affine
from calib.quant_model import QuantModel


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self):
        super().__init__()
        self.conv, self.other = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)

    def forward(self, x):
        return x + self.other(self.conv(x).relu())


class Fused(nn.Module):
    """Two tensors go in and come out, as in HRNet; a block of its own for each, if `residual`, or a pair of layers."""

    def __init__(self, residual):
        super().__init__()
        self.one, self.other = (Residual() if residual else Half() for _ in "ab")

    def forward(self, tensors):
        one, other = self.one(tensors[0]), self.other(tensors[1])
        return [one + other, other]


class Half(nn.Module):
    """Two layers without a shortcut."""

    def __init__(self):
        super().__init__()
        self.conv, self.next = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)

    def forward(self, x):
        return self.next(self.conv(x).relu()).relu()


class Net(nn.Module):
    """A stem, some modules over two tensors, a head."""

    def __init__(self, *modules):
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 16, 3), nn.Sequential(*modules), nn.Linear(16, 10)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head(sum(self.body([x, x])).mean((2, 3)))


def blocks(net):
    torch.manual_seed(0)
    return fold_affine(
        QuantModel.of("net", net.eval().requires_grad_(False)), torch.randn(1, 3, 12, 12)
    ).structure.blocks


def test_blocks_of_one_tensor_are_found_inside_modules_of_two():
    found = blocks(Net(Fused(residual=True), Fused(residual=True)))
    assert [*found] == ["body.0.one", "body.0.other", "body.1.one", "body.1.other"]
    assert not any(block.channels_last for block in found.values())


def test_modules_of_a_repeated_class_are_blocks_where_none_adds_a_shortcut():
    assert [*blocks(Net(Fused(residual=False), Fused(residual=False)))] == [
        "body.0.one", "body.0.other", "body.1.one", "body.1.other",
    ]  # fmt: skip


def test_layers_are_the_blocks_of_a_chain():
    chain = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Conv2d(24, 16, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    assert [*blocks(chain)] == ["2", "4"]  # neither the first layer nor the last, which stay in float


def test_a_block_that_is_called_twice_is_none():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block, self.once = nn.Conv2d(3, 16, 3), Residual(), Residual()
            self.head = nn.Linear(16, 10)

        def forward(self, x):
            return self.head(self.once(self.block(self.block(self.stem(x)))).mean((2, 3)))

    assert [*blocks(Twice())] == ["once"]


def test_a_block_may_return_something_beside_its_tensor():
    class Sized(Residual):
        def forward(self, x, size):
            return super().forward(x), size

    class Sizes(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16, 10)
            self.blocks = nn.ModuleList(Sized() for _ in range(2))

        def forward(self, x):
            x, size = self.stem(x), (10, 10)
            for block in self.blocks:
                x, size = block(x, size)
            return self.head(x.mean((2, 3)))

    assert [*blocks(Sizes())] == ["blocks.0", "blocks.1"]
