"""DiT (Peebles and Xie, ICCV 2023), which tells the noise in a latent at a time step for a class: XL/2 for 256 x 256.

.venv/bin/python docs/examples/dit.py write --latents latents.npz    # calib.npz and eval.npz; without --latents: of noise
make engine MODULE=docs/examples/dit.py:DiT CALIB=calib.npz EVAL=eval.npz WEIGHTS=DiT-XL-2-256x256.pt
.venv/bin/python docs/examples/dit.py compare artifacts/dit.DiT/int8 --weights DiT-XL-2-256x256.pt

Parameters have the names of the authors' checkpoint. `dit.py convert diffusion_pytorch_model.safetensors dit.safetensors`
gives these names to the weights of diffusers' DiTTransformer2DModel. With WEIGHTS=random no figure says anything of DiT.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.layers import Attention, Mlp
from torch import Tensor, nn

SIZES = {"side": 32, "patch": 2, "width": 1152, "depth": 28, "heads": 16, "classes": 1000}  # XL/2; side of a latent
CHANNELS = 4  # of a latent
TRAINING_STEPS = 1000
ANGLES = 256  # numbers that stand for a time step

Predict = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # latent, timestep, class_label -> noise


def waves(positions: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the sines and the cosines (N, width / 2) of `positions` (N,) at falling frequencies."""
    half = width // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions.double()[:, None] * frequencies
    return angles.sin().float(), angles.cos().float()


def places(side: int, width: int) -> Tensor:
    """Return what is added to the patches (1, side * side, width): waves of the column, then of the row."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.cat([*waves(columns.flatten(), width // 2), *waves(rows.flatten(), width // 2)], 1)[None]


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift the channels of tokens `x` (B, T, D) by what the condition gave, (B, D) each."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """Attention and a perceptron, scaled, shifted and gated by the condition (adaLN-Zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.attn = Attention(width, heads, qkv_bias=True)
        self.mlp = Mlp(width, 4 * width, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Compute (B, T, D) of tokens `x` (B, T, D) and `condition` (B, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulated(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulated(self.norm2(x), shift2, scale2))


class Last(nn.Module):
    """The last norm and layer: of each token the pixels of its patch."""

    def __init__(self, width: int, numbers: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, numbers)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Compute (B, T, numbers) of tokens `x` (B, T, D) and `condition` (B, D)."""
        return self.linear(modulated(self.norm_final(x), *self.adaLN_modulation(condition).chunk(2, dim=1)))


class TimeStep(nn.Module):
    """A vector for a time step. Its waves are a table: in FP16, an engine's angles near 1000 would be off by a quarter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(ANGLES, width), nn.SiLU(), nn.Linear(width, width))
        sines, cosines = waves(torch.arange(TRAINING_STEPS), ANGLES)
        self.register_buffer("waves", torch.cat([cosines, sines], 1), persistent=False)

    def forward(self, timestep: Tensor) -> Tensor:
        """Compute (B, D) of whole steps (B,), 0 to 999."""
        return self.mlp(self.waves[timestep])


class DiT(nn.Module):
    """The network. Its variance, which DDIM does not read, is left out of what it returns."""

    def __init__(self) -> None:
        super().__init__()
        side, patch, width = SIZES["side"], SIZES["patch"], SIZES["width"]
        self.patch, self.tokens = patch, side // patch  # tokens along a side
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(CHANNELS, width, patch, patch)})
        self.t_embedder = TimeStep(width)
        labels = SIZES["classes"] + 1  # the last one stands for "no class"
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(labels, width)})
        self.pos_embed = nn.Parameter(places(self.tokens, width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, SIZES["heads"]) for _ in range(SIZES["depth"]))
        self.final_layer = Last(width, patch * patch * 2 * CHANNELS)

    def forward(self, latent: Tensor, timestep: Tensor, class_label: Tensor) -> Tensor:
        """Compute the noise (B, 4, side, side) in `latent` of that shape, at `timestep` (B,), of `class_label` (B,)."""
        x = self.x_embedder["proj"](latent).flatten(2).transpose(1, 2) + self.pos_embed
        condition = self.t_embedder(timestep) + self.y_embedder["embedding_table"](class_label)
        for block in self.blocks:
            x = block(x, condition)
        x = self.final_layer(x, condition).reshape(-1, self.tokens, self.tokens, self.patch, self.patch, 2 * CHANNELS)
        x = x.permute(0, 5, 1, 3, 2, 4).reshape(-1, 2 * CHANNELS, self.tokens * self.patch, self.tokens * self.patch)
        return x[:, :CHANNELS]


def converted(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of `DiT` out of that of diffusers' DiTTransformer2DModel, whose blocks all keep the embedders.

    Both compute the same to 1.3e-6 (relative L2, random weights) once diffusers' waves have the authors' frequencies: it
    divides by 127 where the authors divide by 128.
    """
    condition = "transformer_blocks.0.norm1.emb."
    names = {
        "x_embedder.proj": "pos_embed.proj", "t_embedder.mlp.0": f"{condition}timestep_embedder.linear_1",
        "t_embedder.mlp.2": f"{condition}timestep_embedder.linear_2",
        "y_embedder.embedding_table": f"{condition}class_embedder.embedding_table",
        "final_layer.adaLN_modulation.1": "proj_out_1", "final_layer.linear": "proj_out_2",
    }  # fmt: skip
    blocks = len({name.split(".")[1] for name in theirs if name.startswith("transformer_blocks.")})
    for index in range(blocks):
        ours, block = f"blocks.{index}.", f"transformer_blocks.{index}."
        names |= {
            f"{ours}adaLN_modulation.1": f"{block}norm1.linear", f"{ours}attn.proj": f"{block}attn1.to_out.0",
            f"{ours}mlp.fc1": f"{block}ff.net.0.proj", f"{ours}mlp.fc2": f"{block}ff.net.2",
        }  # fmt: skip
    found = {f"{our}.weight": theirs[f"{name}.weight"] for our, name in names.items()}
    found |= {f"{our}.bias": theirs[f"{name}.bias"] for our, name in names.items() if "embedding_table" not in our}
    for index in range(blocks):
        for kind in ("weight", "bias"):
            parts = [theirs[f"transformer_blocks.{index}.attn1.to_{each}.{kind}"] for each in "qkv"]
            found[f"blocks.{index}.attn.qkv.{kind}"] = torch.cat(parts)
    return {**found, "pos_embed": places(SIZES["side"] // SIZES["patch"], SIZES["width"])}


def kept_signal() -> np.ndarray:
    """Return the share of a latent's variance that is left at every training step (1000,), of the linear schedule."""
    return np.cumprod(1 - np.linspace(1e-4, 0.02, TRAINING_STEPS))


def schedule(steps: int) -> np.ndarray:
    """Return the `steps` time steps of DDIM, falling to 0."""
    return np.arange(0, TRAINING_STEPS, TRAINING_STEPS // steps)[:steps][::-1].copy()


def noised(latents: np.ndarray, labels: np.ndarray, steps: int, first: int) -> dict[str, np.ndarray]:
    """Return every latent (N, 4, side, side) at every one of the `steps`, each with other noise, as the arrays of a file.

    Half of the rows have "no class" in the place of their label: guidance asks for both. `groups`: the latent of a row,
    counted from `first`, which seeds the noise too.
    """
    random, left = np.random.default_rng(first), kept_signal()
    times, of = np.tile(schedule(steps), len(latents)), np.repeat(np.arange(len(latents)), steps)
    signal = left[times][:, None, None, None]
    noise = random.normal(size=(len(times), *latents.shape[1:]))
    return {
        "latent": (np.sqrt(signal) * latents[of] + np.sqrt(1 - signal) * noise).astype(np.float32),
        "timestep": times.astype(np.int64),
        "class_label": np.where(random.random(len(times)) < 0.5, labels[of], SIZES["classes"]).astype(np.int64),
        "groups": first + of,
    }


def guided(predict: Predict, x: np.ndarray, step: int, labels: np.ndarray, guidance: float) -> np.ndarray:
    """Return the noise in `x` (B, 4, side, side) at `step`, away from that of no class by the factor `guidance`."""
    times = np.full(len(x), step)
    with_class = predict(x, times, labels)
    if guidance == 1:
        return with_class
    without = predict(x, times, np.full(len(x), SIZES["classes"]))
    return without + guidance * (with_class - without)


def ddim_step(x: np.ndarray, noise: np.ndarray, step: int, after: int | None) -> np.ndarray:
    """Return the latents at the step `after` `step`, or at the end for None, without new noise (Song et al., ICLR 2021)."""
    left = kept_signal()
    now, then = left[step], 1.0 if after is None else left[after]
    clean = (x - np.sqrt(1 - now) * noise) / np.sqrt(now)
    return (np.sqrt(then) * clean + np.sqrt(1 - then) * noise).astype(np.float32)


def sampled(
    exact: Predict, rounded: Predict, noise: np.ndarray, labels: np.ndarray, steps: int, guidance: float
) -> tuple[np.ndarray, np.ndarray, dict[int, float]]:
    """Return (samples of `exact`, of `rounded`, by step the SQNR of what `rounded` says of the latents of `exact`)."""
    from deploy.measure.accuracy import sqnr_db

    x, y, found = noise, noise, {}
    times = [int(step) for step in schedule(steps)]
    for step, after in zip(times, [*times[1:], None], strict=True):
        told = guided(exact, x, step, labels, guidance)
        found[step] = sqnr_db(told, guided(rounded, x, step, labels, guidance))
        x, y = (
            ddim_step(x, told, step, after),
            ddim_step(y, guided(rounded, y, step, labels, guidance), step, after),
        )
    return x, y, found


def both_networks(package: Path, weights: str) -> tuple[Predict, Predict]:
    """Return the float network with its `weights` and the INT8 graph of a package. Raises UserError if they differ."""
    from calib.errors import UserError
    from calib.inputs import Input, Inputs
    from calib.weights.load import load_net
    from calib.weights.zoo import own_model
    from deploy.measure.onnx_runner import OnnxRunner
    from deploy.package import MANIFEST, read_json

    manifest = read_json(package / MANIFEST)
    shapes = {"latent": (CHANNELS, SIZES["side"], SIZES["side"]), "timestep": (), "class_label": ()}
    inputs = Inputs(tuple(Input(name, "int64" if shape == () else "float32", shape) for name, shape in shapes.items()))
    if manifest["weights"]["module"] is None:
        raise UserError(f"'{package}' is of the model {manifest['model']}: expected a package of this file's DiT")
    loaded = load_net(own_model(manifest["weights"]["module"]["factory"]), weights, inputs=lambda: inputs)
    if loaded.random:
        print("RANDOM WEIGHTS: these figures say nothing of DiT")
    if loaded.sha256 != manifest["weights"]["sha256"]:
        raise UserError(f"'{package}' was made of other weights than --weights {weights}: give those it was made of")
    graph = OnnxRunner(package / "model.fp32.onnx")

    def exact(latent: np.ndarray, timestep: np.ndarray, class_label: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            given = map(torch.from_numpy, (latent, timestep, class_label))
            return loaded.net(**dict(zip(inputs.names, given, strict=True))).numpy()

    def rounded(latent: np.ndarray, timestep: np.ndarray, class_label: np.ndarray) -> np.ndarray:
        return graph({"latent": latent, "timestep": timestep, "class_label": class_label})

    return exact, rounded


def latents_from(path: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return (latents (N, *shape), labels (N,)) of a .npz file. Raises UserError if it holds none."""
    from calib.errors import UNREADABLE_ARRAYS, UserError

    expected = f"expected a .npz with latents (N, {', '.join(map(str, shape))}) and labels (N,)"
    try:
        with np.load(path, allow_pickle=False) as file:
            latents, labels = file["latents"], file["labels"]
    except (*UNREADABLE_ARRAYS, KeyError) as error:
        raise UserError(f"'{path}' cannot be read ({error}): {expected}") from error
    if latents.shape[1:] != shape or labels.shape != latents.shape[:1]:
        raise UserError(f"'{path}' has latents {latents.shape} and labels {labels.shape}: {expected}")
    if not ((labels >= 0) & (labels < SIZES["classes"])).all():
        raise UserError(
            f"'{path}' has labels from {labels.min()} to {labels.max()}: expected 0 to {SIZES['classes'] - 1}"
        )
    return latents, labels


def write(args: argparse.Namespace) -> None:
    """Write calib.npz and eval.npz."""
    from calib.errors import UserError

    shape = (CHANNELS, SIZES["side"], SIZES["side"])
    random = np.random.default_rng(0)
    if args.latents:
        latents, labels = latents_from(args.latents, shape)
        source = f"latents of {args.latents}"
    else:
        latents = random.normal(size=(args.samples, *shape))
        labels = random.integers(0, SIZES["classes"], args.samples)
        source = "latents of noise, which is no picture: with latents of your own, give --latents"
    if len(latents) < 2:
        raise UserError("expected at least two latents: one to calibrate on and one to judge")
    judged = max(1, len(latents) // 5)
    args.to.mkdir(parents=True, exist_ok=True)
    for name, first, end in (("calib", judged, None), ("eval", 0, judged)):
        arrays = noised(latents[first:end], labels[first:end], args.steps, first)
        np.savez(args.to / f"{name}.npz", **arrays)
        print(f"{args.to / name}.npz: {len(arrays['timestep'])} rows, {source}")


def compare(args: argparse.Namespace) -> None:
    """Print how near the INT8 graph of a package comes to the float network, by step and in samples from equal noise."""
    from deploy.measure.accuracy import sqnr_db

    exact, rounded = both_networks(args.package, args.weights)
    random = np.random.default_rng(args.seed)
    noise = random.normal(size=(args.samples, CHANNELS, SIZES["side"], SIZES["side"])).astype(np.float32)
    labels = random.integers(0, SIZES["classes"], args.samples)
    x, y, by_step = sampled(exact, rounded, noise, labels, args.steps, args.guidance)
    for step, decibels in by_step.items():
        print(f"step {step:4}: SQNR of the noise that is told {decibels:6.2f} dB")
    error, span = np.square(y.astype(np.float64) - x).mean(), float(x.max() - x.min())
    psnr = 10 * np.log10(span**2 / error) if error else np.inf
    print(f"{args.samples} samples, {args.steps} DDIM steps, guidance {args.guidance}: SQNR {sqnr_db(x, y):.2f} dB, "
          f"PSNR {psnr:.2f} dB of latents that span {span:.2f}")  # fmt: skip


def convert(args: argparse.Namespace) -> None:
    """Write weights of diffusers under the names of `DiT`."""
    from calib.errors import UserError

    try:
        found = converted(load_file(args.theirs))
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(
            f"'{args.theirs}' cannot be read ({error}): expected diffusers' transformer/diffusion_pytorch_model.safetensors"
        ) from error
    save_file({name: value.contiguous() for name, value in found.items()}, args.ours)
    print(f"{args.ours}: give it as WEIGHTS=")


def main(argv: list[str] | None = None) -> int:
    """Run one of the three commands; returns the exit code."""
    sys.path.insert(0, str(Path(__file__).parents[2]))  # the tool itself
    from deploy.cli import answered

    parser = argparse.ArgumentParser(description=main.__doc__)
    verbs = parser.add_subparsers(required=True)
    writing = verbs.add_parser("write", help="write calib.npz and eval.npz")
    writing.add_argument(
        "--latents", help="a .npz with latents (N, 4, 32, 32), scaled as DiT reads them, and labels (N,)"
    )
    writing.add_argument("--samples", type=int, default=20, help="latents of noise without --latents (default 20)")
    writing.add_argument("--to", type=Path, default=Path(), help="the folder of both files")
    comparing = verbs.add_parser("compare", help="compare a package with the float network")
    comparing.add_argument("package", type=Path)
    comparing.add_argument("--weights", default="auto", help="what WEIGHTS= was")
    comparing.add_argument("--samples", type=int, default=4)
    comparing.add_argument("--guidance", type=float, default=1.5, help="of classes; 1: none (default 1.5)")
    comparing.add_argument("--seed", type=int, default=0)
    for each in (writing, comparing):
        each.add_argument("--steps", type=int, default=50, choices=range(1, TRAINING_STEPS + 1), metavar="STEPS")
    converting = verbs.add_parser("convert", help="rename the weights of diffusers")
    converting.add_argument("theirs", type=Path)
    converting.add_argument("ours", type=Path)
    for each, run in ((writing, write), (comparing, compare), (converting, convert)):
        each.set_defaults(run=run)
    args = parser.parse_args(argv)

    def run() -> int:
        args.run(args)
        return 0

    return answered(run)


if __name__ == "__main__":
    sys.exit(main())
