"""Networks that enlarge pictures: two of Real-ESRGAN (Wang et al., ICCVW 2021), RDN and the baseline of EDSR.

They read and return pictures (B, 3, H, W), RGB in 0..1, of any height and width. Those of Real-ESRGAN were trained as GANs,
to look sharp: their PSNR to a true picture says little, that of an INT8 network to the float network does.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from calib.weights.tfjs import convolutions_from_tfjs, tensors_from_tfjs

SCALE = 4
SIDE = 128  # of the pictures that are read, in pixels, where INPUT= gives none
IMAGES: dict[str, Any] = {
    "input_size": (3, SIDE, SIDE), "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center",
    "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0),
}  # fmt: skip


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


class ShallowDenseBlock(nn.Module):
    """RDN's block with one convolution: what it makes and what it reads, fused by a 1x1 convolution, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.fuse = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return what has the shape of `x`."""
        return self.fuse(torch.cat((x, functional.relu(self.conv(x))), 1)) + x


class RDN(nn.Module):
    """Residual dense network (Zhang et al., CVPR 2018) of idealo's image-super-resolution, as UpscalerJS trained it again.

    The outputs of all blocks are fused and added to the first features; then three convolutions, enlarging to the nearest
    pixel, and a last convolution. UpscalerJS gives it values in 0..255. It takes 0..1 here, where it comes closer to the
    originals of 14 photographs at x4 (by 0.5 dB on average; at x2 they are 0.1 dB farther), and is not linear in between.
    """

    def __init__(self, scale: int, depth: int = 10, width: int = 64) -> None:
        super().__init__()
        self.scale = scale
        self.first, self.second = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.blocks = nn.ModuleList(ShallowDenseBlock(width) for _ in range(depth))
        self.fuse1, self.fuse2 = nn.Conv2d(depth * width, width, 1), nn.Conv2d(width, width, 3, padding=1)
        self.up1, self.up2 = nn.Conv2d(width, 64, 5, padding=2), nn.Conv2d(64, 32, 3, padding=1)
        self.up3, self.last = nn.Conv2d(32, 3 * scale**2, 3, padding=1), nn.Conv2d(3 * scale**2, 3, 3, padding=1)
        self.pretrained_cfg, self.returns_pictures = IMAGES, True

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 3, scale H, scale W)."""
        first = self.first(x)
        made = [self.second(first)]
        for block in self.blocks:
            made.append(block(made[-1]))
        x = first + self.fuse2(self.fuse1(torch.cat(made[1:], 1)))
        x = self.up3(functional.relu(self.up2(functional.relu(self.up1(x)))))
        return self.last(functional.interpolate(x, scale_factor=self.scale, mode="nearest"))


class ResidualBlock(nn.Module):
    """EDSR's block: two convolutions with ReLU between them, added to the input, without normalisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return what has the shape of `x`."""
        return self.body(x) + x


class EDSR(nn.Module):
    """Baseline of EDSR x4 (Lim et al., CVPRW 2017) under the names of EDSR-PyTorch, whose checkpoints WEIGHTS= takes.

    There `sub_mean` and `add_mean` take the mean of DIV2K off values in 0..255 and add it again. Here the same is done in
    two steps, so that the network reads and returns 0..1; a checkpoint's entries of these two are left out.
    """

    mean: Tensor

    def __init__(self, depth: int = 16, width: int = 64) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, width, 3, padding=1))
        blocks = (ResidualBlock(width) for _ in range(depth))
        self.body = nn.Sequential(*blocks, nn.Conv2d(width, width, 3, padding=1))
        enlarging: list[nn.Module] = []
        for _ in range(2):
            enlarging += [nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2)]
        self.tail = nn.Sequential(nn.Sequential(*enlarging), nn.Conv2d(width, 3, 3, padding=1))
        self.register_buffer("mean", torch.tensor([0.4488, 0.4371, 0.4040]).view(3, 1, 1), persistent=False)
        self.pretrained_cfg, self.returns_pictures = IMAGES, True

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 3, 4 H, 4 W)."""
        x = self.head((x - self.mean) * 255)
        return self.tail(self.body(x) + x) / 255 + self.mean


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "srvgg_x4": SRVGG,
    "rrdb6_x4": partial(RRDBNet, 6),
    "edsr_x4": EDSR,
    **{f"rdn_x{scale}": partial(RDN, scale) for scale in (2, 3, 4, 8)},
}


def rdn_from_tfjs(model: bytes, shard: bytes, net: nn.Module) -> dict[str, Tensor]:
    """The state dict of an RDN, read from a Keras network's files. Raises ValueError if they are of another network."""
    tensors = tensors_from_tfjs(model, shard)
    blocks = range(1, 1 + sum(name.startswith("LFF_") for name in tensors) // 2)
    inner = [name for number in blocks for name in (f"F_{number}_1", f"LFF_{number}")]
    names = ["F_m1", "F_0", *inner, "GFF_1", "GFF_2", "UPN1", "UPN2", "UPN3", "SR"]
    return convolutions_from_tfjs(net, ((tensors[f"{name}/kernel"], tensors[f"{name}/bias"]) for name in names))
