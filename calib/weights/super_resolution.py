"""Networks of Real-ESRGAN (Wang et al., ICCVW 2021; BSD-3) that enlarge pictures four times, with the weights of ncnn files.

They read and return pictures (B, 3, H, W), RGB in 0..1, of any height and width. They were trained as GANs, to look sharp:
their PSNR to a true picture says little, that of an INT8 network to the float network does.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

SCALE = 4
SIDE = 128  # of the pictures that are read, in pixels, where INPUT= gives none
IMAGES: dict[str, Any] = {
    "input_size": (3, SIDE, SIDE), "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center",
    "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0),
}  # fmt: skip
FLOAT16_WEIGHTS = 0x01306B47  # what ncnn writes in front of weights that it keeps in float16


class SRVGG(nn.Module):
    """SRVGGNetCompact: convolutions with PReLU at the size of the input, pixel shuffle, and the enlarged input added."""

    def __init__(self, width: int = 64, depth: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.PReLU(width)]
        for _ in range(depth):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.PReLU(width)]
        self.body = nn.Sequential(*layers, nn.Conv2d(width, 3 * SCALE**2, 3, padding=1))
        self.upsampler = nn.PixelShuffle(SCALE)
        self.pretrained_cfg, self.returns_pictures = IMAGES, True

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 3, 4 H, 4 W)."""
        return self.upsampler(self.body(x)) + functional.interpolate(x, scale_factor=SCALE, mode="nearest")


class DenseBlock(nn.Module):
    """Five convolutions, each reading all before it, added to the input with a weight of 0.2."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.conv4 = (
            nn.Conv2d(width + number * growth, growth, 3, padding=1) for number in range(4)
        )
        self.conv5 = nn.Conv2d(width + 4 * growth, width, 3, padding=1)
        self.act = nn.LeakyReLU(0.2)

    def forward(self, x: Tensor) -> Tensor:
        """Return what has the shape of `x`."""
        x1 = self.act(self.conv1(x))
        x2 = self.act(self.conv2(torch.cat((x, x1), 1)))
        x3 = self.act(self.conv3(torch.cat((x, x1, x2), 1)))
        x4 = self.act(self.conv4(torch.cat((x, x1, x2, x3), 1)))
        return self.conv5(torch.cat((x, x1, x2, x3, x4), 1)) * 0.2 + x


class RRDB(nn.Module):
    """Residual in residual dense block: three dense blocks, added to the input with a weight of 0.2."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (DenseBlock(width, growth) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Return what has the shape of `x`."""
        return self.rdb3(self.rdb2(self.rdb1(x))) * 0.2 + x


class RRDBNet(nn.Module):
    """ESRGAN's generator: a row of RRDBs at the size of the input, then twice enlarged by two."""

    def __init__(self, depth: int = 6, width: int = 64, growth: int = 32) -> None:
        super().__init__()
        self.conv_first = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Sequential(*(RRDB(width, growth) for _ in range(depth)))
        self.conv_body, self.conv_up1, self.conv_up2, self.conv_hr = (
            nn.Conv2d(width, width, 3, padding=1) for _ in range(4)
        )
        self.conv_last = nn.Conv2d(width, 3, 3, padding=1)
        self.act = nn.LeakyReLU(0.2)
        self.pretrained_cfg, self.returns_pictures = IMAGES, True

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 3, 4 H, 4 W)."""
        first = self.conv_first(x)
        x = first + self.conv_body(self.body(first))
        x = self.act(self.conv_up1(functional.interpolate(x, scale_factor=2, mode="nearest")))
        x = self.act(self.conv_up2(functional.interpolate(x, scale_factor=2, mode="nearest")))
        return self.conv_last(self.act(self.conv_hr(x)))


BUILDERS: dict[str, Callable[[], nn.Module]] = {"srvgg_x4": SRVGG, "rrdb6_x4": partial(RRDBNet, 6)}


def _layers(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers with weights in the order of the file, which is that of the modules."""
    return ((name, each) for name, each in net.named_modules() if isinstance(each, nn.Conv2d | nn.PReLU))


def weights_from_ncnn(blob: bytes, net: nn.Module) -> dict[str, Tensor]:
    """The state dict of `net`, read from the .bin file of ncnn: float16 weights, float32 biases and slopes, in a row.

    Raises ValueError if the file holds more or less than that.
    """
    at, state = 0, {}

    def numbers(count: int, dtype: str) -> np.ndarray:
        nonlocal at
        size = count * np.dtype(dtype).itemsize
        if at + size > len(blob):
            raise ValueError(f"the file ends after {len(blob)} bytes, {at + size} or more were expected")
        found = np.frombuffer(blob, dtype, count, at)
        at += -(-size // 4) * 4  # ncnn fills up to whole words
        return found.astype(np.float32)

    for name, layer in _layers(net):
        weight = layer.get_parameter("weight")
        if isinstance(layer, nn.Conv2d):
            tag = int.from_bytes(blob[at : at + 4], "little")
            at += 4
            if tag != FLOAT16_WEIGHTS:
                raise ValueError(f"the weights of '{name}' are not float16 (tag {tag:#x})")
            state[f"{name}.weight"] = torch.from_numpy(numbers(weight.numel(), "<f2").reshape(weight.shape))
            state[f"{name}.bias"] = torch.from_numpy(numbers(layer.get_parameter("bias").numel(), "<f4"))
        else:
            state[f"{name}.weight"] = torch.from_numpy(numbers(weight.numel(), "<f4"))
    if at != len(blob):
        raise ValueError(f"the file holds {len(blob)} bytes, {at} were expected")
    return state
