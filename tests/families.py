"""A tiny instance of many families of networks, each with weights that quantization and wrong moves really change."""

import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from timm.models.regnet import RegNet, RegNetCfg
from torch import Tensor, nn
from torch.nn import functional as F

SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
# (architecture of timm or its class, options, size of the image in pixels)
TIMM = {
    "vit": ("vit_tiny_patch16_224", SMALL_VIT, 32),
    "deit distilled": ("deit_tiny_distilled_patch16_224", SMALL_VIT, 32),
    "eva02": ("eva02_tiny_patch14_224", SMALL_VIT, 32),
    "dinov3": ("vit_small_patch16_dinov3", SMALL_VIT, 32),
    "clip image tower": ("vit_base_patch32_clip_quickgelu_224", {**SMALL_VIT, "num_classes": 32}, 32),
    "siglip": ("vit_base_patch16_siglip_224", SMALL_VIT, 32),
    "beit": ("beit_base_patch16_224", SMALL_VIT, 32),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (3, 6)},
        32,
    ),
    "swin v2": (
        "swinv2_tiny_window8_256",
        {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (3, 6)},
        32,
    ),
    "convnext": ("test_convnext", {}, 64),
    "resnet": ("test_resnet", {}, 32),
    "mobilenet v3": ("mobilenetv3_small_050", {}, 64),
    "efficientnet, same padding": ("test_efficientnet", {"pad_type": "same"}, 48),
    "regnet y": (RegNet, {"cfg": RegNetCfg(depth=5, w0=24, wa=14, wm=1.5, group_size=8, se_ratio=0.25)}, 64),
    "nfnet": ("test_nfnet", {}, 64),
    "mixer": (MlpMixer, {"img_size": 32, "patch_size": 4, "num_blocks": 2, "embed_dim": 48}, 32),
    "levit": (
        "levit_128s",
        {"img_size": 64, "embed_dim": (32, 48), "depth": (1, 1), "num_heads": (2, 3), "key_dim": 16},
        64,
    ),
    "sam 2": (
        "sam2_hiera_tiny",
        {"embed_dim": 24, "num_heads": 1, "stages": (1, 1, 2, 1), "global_att_blocks": (3,), "window_spec": (4, 4, 4, 2)},
        64,
    ),
    "hiera": ("hiera_tiny_224", {"img_size": (64, 64), "embed_dim": 24, "num_heads": 1, "stages": (1, 1, 2, 1)}, 64),
}  # fmt: skip


class GatedBlock(nn.Module):
    """A residual block with SwiGLU whose two halves are layers of their own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate, self.up, self.down = nn.Linear(width, 40), nn.Linear(width, 40), nn.Linear(40, width)

    def forward(self, x: Tensor) -> Tensor:
        x_n = self.norm(x)
        return x + self.down(F.silu(self.gate(x_n)) * self.up(x_n))


class OwnNetwork(nn.Module):
    """A network of no library: a stem, one residual block of convolutions, two gated blocks on tokens, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.first, self.second = nn.Conv2d(16, 24, 1, bias=False), nn.Conv2d(24, 16, 3, padding="same")
        self.blocks = nn.ModuleList(GatedBlock(16) for _ in range(2))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + self.second(F.relu(self.first(x)))
        x = F.max_pool2d(x, 2).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Chain(nn.Module):
    """A network without residual sums and without a module that repeats, as VGG is."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.hidden, self.head = nn.Linear(24, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).flatten(2).transpose(1, 2)
        return self.head(F.relu(self.hidden(x)).mean(1))


class Pyramid(nn.Module):
    """Maps of two sizes that one head reads, as detectors do; a linear layer lies at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1), nn.GroupNorm(4, 16)
        self.down, self.up = nn.Conv2d(16, 16, 3, 2, 1), nn.Conv2d(16, 16, 1)
        self.tower = nn.Conv2d(16, 24, 3, padding=1)
        mixed = nn.Linear(24, 24)
        self.mix = nn.ModuleList([mixed, mixed])
        self.first, self.second = nn.Linear(24, 32), nn.Linear(32, 24)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        fine = F.relu(self.norm(self.stem(x)))
        coarse = F.relu(self.down(fine))
        fine = fine + F.interpolate(self.up(coarse), scale_factor=2)
        tokens = [
            mix(F.relu(self.tower(maps)).flatten(2).transpose(1, 2))
            for mix, maps in zip(self.mix, (fine, coarse), strict=True)
        ]
        return self.head(F.gelu(self.second(F.relu(self.first(torch.cat(tokens, 1))))).mean(1))


class OddLayers(nn.Module):
    """Convolutions of sequences, transposed ones with a stride and without, a border that mirrors, a fixed filter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mirrored = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 24, 3, padding=1, padding_mode="reflect")
        self.blur = nn.Buffer(torch.ones(24, 1, 2, 2) / 4)
        self.turned, self.up = nn.ConvTranspose2d(24, 16, 3, 1, 1, groups=2), nn.ConvTranspose2d(16, 16, 2, 2)
        self.mix, self.along = nn.Conv1d(16, 24, 1), nn.Conv1d(24, 16, 3, padding="same", dilation=2)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.mirrored(F.relu(self.stem(x))))
        x = F.relu(self.turned(F.conv2d(x, self.blur, stride=2, groups=24)))
        x = F.relu(self.up(x)).flatten(2)
        return self.head(F.gelu(self.along(F.relu(self.mix(x)))).mean(2))


OWN = {"own module": OwnNetwork, "chain": Chain, "pyramid": Pyramid, "odd layers": OddLayers}
FAMILIES = (*TIMM, *OWN)


@torch.no_grad()
def family_net(family: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """(a network in eval mode, float32, an example (2, 3, H, W)): random, with uneven norms and running statistics."""
    torch.manual_seed(seed)
    if family in OWN:
        net, size = OWN[family](), 32
    else:
        name, options, size = TIMM[family]
        options = {"num_classes": 10, **options}
        net = timm.create_model(name, **options) if isinstance(name, str) else name(**options)
    for module in net.modules():
        if family in OWN and isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            module.weight.mul_(3)  # as drawn, biases would drown what the image says
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2.0)
        kinds = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
        if isinstance(module, kinds) and module.weight is not None:
            module.weight.uniform_(0.5, 1.5)
            if module.bias is not None:
                module.bias.normal_(0, 0.2)
        for name, parameter in module.named_parameters(recurse=False):
            if (
                name.startswith(("gamma", "skipinit_gain", "q_bias", "v_bias")) or parameter.abs().max() < 1e-2
            ):  # what starts at next to nothing
                parameter.normal_(0, 0.2)
    return net.eval().requires_grad_(False), torch.randn(2, 3, size, size)
