"""NanoDet-g (RangiLyu, Apache-2.0), a detector of COCO's 80 classes made of plain convolutions, read from TensorFlow.js.

It returns raw maps, three of class scores and three of box distances; what makes boxes of them stays outside, and the
attribute `boxes` of the network tells how. Paddings are written in the graph and symmetric, so they are torch's own.

The graph reads 8-bit BGR less (103.53, 116.28, 123.675), divided by (57.375, 57.12, 58.395). The kernel of its first
convolution is turned to RGB here, and the mean and std below are the same numbers, divided by 255, for RGB in 0..1: those of
ImageNet. Pictures are stretched to the square that the network takes, both edges on their own and without a crop, so that
nothing in them is lost; a box goes back to its picture by the two factors.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from calib.weights.tfjs import convolutions_from_tfjs, tensors_from_tfjs

SIDE = 416  # of the square that the network was trained for, in pixels
STRIDES = (8, 16, 32)  # pixels of the input that one cell of a map stands for, along each axis
CLASSES, BINS = 80, 11
IMAGES: dict[str, Any] = {
    "input_size": (3, SIDE, SIDE), "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash",
    "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
}  # fmt: skip


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.LeakyReLU(0.1))


class Pair(nn.Module):
    """Two convolutions of half the width, both of which are kept: (B, C, H, W) in and out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = _conv(width, width // 2), _conv(width // 2, width // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the second beside the first."""
        first = self.conv1(x)
        return torch.cat((self.conv2(first), first), 1)


class Stage(nn.Module):
    """A stage of a cross-stage partial network: what its pairs make, beside what they were given.

    (B, C, H, W) becomes (B, 2 C, H / stride, W / stride).
    """

    def __init__(self, width: int, pairs: int, stride: int) -> None:
        super().__init__()
        self.enter = _conv(width, width, stride)
        self.pairs = nn.Sequential(*(Pair(width) for _ in range(pairs)))
        self.leave = _conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return twice as many channels as `x` has."""
        x = self.enter(x)
        return torch.cat((self.leave(self.pairs(x)), x), 1)


def _resized(x: Tensor, like: Tensor) -> Tensor:
    return functional.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


class NanoDet(nn.Module):
    """NanoDet-g: a cross-stage partial backbone, a pyramid that goes down and up again, and one head per size of cells."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(3, 32, 2), nn.MaxPool2d(3, 2, padding=1))
        self.stage1, self.stage2, self.stage3, self.stage4 = (
            Stage(inputs, pairs, stride) for inputs, pairs, stride in ((32, 1, 1), (64, 2, 2), (128, 2, 2), (256, 3, 2))
        )
        self.lateral = nn.ModuleList(nn.Conv2d(inputs, width, 1) for inputs in (128, 256, 512))
        outputs = CLASSES + 4 * BINS
        self.heads = nn.ModuleList(nn.Sequential(_conv(width, width), nn.Conv2d(width, outputs, 1)) for _ in STRIDES)
        self.pretrained_cfg = IMAGES
        self.boxes = {
            "form": "bins", "strides": [*STRIDES], "bins": BINS, "image": [SIDE, SIDE], "classes": CLASSES,
        }  # fmt: skip

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return `scores_8` (B, 80, H / 8, W / 8), logits, and `boxes_8` (B, 4 * 11, H / 8, W / 8); so for 16 and 32.

        A box has four distances from the centre of its cell, left, top, right and bottom. Each is a distribution over 11
        bins, as logits: its mean, in strides, is the distance. `x`: (B, 3, H, W), normalised RGB.
        """
        fine = self.stage2(self.stage1(self.stem(x)))
        middle = self.stage3(fine)
        coarse = self.stage4(middle)
        fine, middle, coarse = (each(y) for each, y in zip(self.lateral, (fine, middle, coarse), strict=True))
        middle = middle + _resized(coarse, middle)
        fine = fine + _resized(middle, fine)
        middle = middle + _resized(fine, middle)
        coarse = coarse + _resized(middle, coarse)
        maps = {}
        for stride, head, y in zip(STRIDES, self.heads, (fine, middle, coarse), strict=True):
            maps[f"scores_{stride}"], maps[f"boxes_{stride}"] = head(y).split((CLASSES, 4 * BINS), 1)
        return maps


BUILDERS = {"nanodet": NanoDet}


def nanodet_from_tfjs(model: bytes, shard: bytes, net: nn.Module) -> dict[str, Tensor]:
    """The state dict of a NanoDet, read from its graph's files. Raises ValueError if they are of another network.

    The converter numbered the kernels in the order in which the graph computes, and wrote each bias behind its kernel.
    """
    tensors = tensors_from_tfjs(model, shard)
    names = list(tensors)
    kernels = sorted((name for name in names if tensors[name].ndim == 4), key=_number)
    state = convolutions_from_tfjs(net, ((tensors[k], tensors[names[names.index(k) + 1]]) for k in kernels))
    first = next(iter(state))
    return state | {first: state[first].flip(1)}  # BGR to RGB


def _number(name: str) -> int:
    """The number behind 'split' in the name of a kernel; the first has none."""
    return int(name.rpartition("split")[2].lstrip("_") or 0)
