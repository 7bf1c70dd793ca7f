"""QwT*: branches trained for one epoch on top of the closed form (Fu et al., CVPR 2025, appendix A).

    loss = mean_batch sum_features |f - f_Z|^2

f is the penultimate feature of the exact network, f_Z that of the quantized one (class token or pooled map; of a network
without classifier its output). All but the branches is frozen: integers, scales, norms. Gradients pass through rounding
(calib/network/qdq.py), and what trains runs in FP16 (compensation/star/masters.py).

What differs from the paper: calibration images have no labels here, so its cross-entropy term is absent and the classifier
does not train. What the paper leaves open, and what is done here: the squares are summed over features and averaged over the
batch; the rate falls along a cosine; images are not augmented.

The first half of the calibration images and one part of the second half train; the other part judges.
"""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib.images.batches import Half
from calib.judge.held_out import Candidate, Offer
from calib.network.qdq import quantized_net
from calib.quant_model import QuantModel
from calib.store.kept_files import nets_sha256, tensors_sha256
from calib.store.provenance import code_sha256
from calib.store.watch import UNWATCHED, Watch
from compensation.star.masters import Masters
from compensation.star.minibatches import minibatches
from compensation.star.trainable import trained_parameters, with_values

# (start of the name of timm's architecture or else of the class, AdamW's rate, where it comes from); the first that fits
LEARNING_RATES = (
    ("deit|swin", 5e-6, "QwT, appendix A"),
    ("vit", 1e-7, "QwT, appendix A"),
    ("resnet", 1e-5, "QwT, appendix A"),
    ("", 1e-5, "none published: as ResNet"),
)


@dataclass(frozen=True)
class Config:
    """How long and how fast; the defaults are the paper's, made for the whole training set of ImageNet."""

    epochs: int = 1
    batch: int = 32
    learning_rate: float = (
        0.0  # of AdamW at the start; 0 = the architecture's, which barely moves on a few hundred images
    )
    window: int = 512  # images in memory among which the next is drawn
    save_every: int = 50  # steps between checkpoints
    seed: int = 0  # of the order of the images

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "window", "save_every"):
            if (number := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {number}: expected 1 or more")
        if not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate}: expected a number of at least 0")


class Training:
    """The images that train, in batches, and how many there are."""

    def __init__(self, halves: Sequence[Half]) -> None:
        self.parts = [*halves[0].parts, halves[1].parts[0]]
        self.count = sum(len(batch) for batch in self)

    def __iter__(self) -> Iterator[Tensor]:
        return itertools.chain(*self.parts)


def learning_rate_of(model: QuantModel) -> tuple[float, str]:
    """(the rate for this kind of network, where it comes from)."""
    architecture = (getattr(model.float_net, "pretrained_cfg", None) or {}).get(
        "architecture", model.structure.kind.lower()
    )
    return next((rate, why) for start, rate, why in LEARNING_RATES if re.match(start, architecture))


def cosine(rate: float, step: int, steps: int) -> float:
    """The learning rate of `step`: `rate` at 0, 0 at `steps`."""
    return rate * (1 + math.cos(math.pi * step / steps)) / 2


def loss_of(net: Any, exact: Any, images: Tensor) -> Tensor:
    """Return the loss of the quantized `net` against the `exact` one on `images` (B, 3, H, W), a tensor of one number."""
    with torch.no_grad():
        target = exact.forward_head(exact.forward_features(images), pre_logits=True)
    difference = net.forward_head(net.forward_features(images), pre_logits=True) - target
    return difference.square().sum(1).mean()


def _batches_from(step: int, images: Training, config: Config) -> Iterator[Tensor]:
    """Yield the mini-batches of all epochs from `step` on."""
    first, done = divmod(step, math.ceil(images.count / config.batch))
    for epoch in range(first, config.epochs):
        batches = minibatches(images, config.batch, config.window, config.seed + epoch)
        yield from itertools.islice(batches, done if epoch == first else 0, None)


def steps_of(images: Training, config: Config) -> int:
    """Return the number of steps of all epochs."""
    return config.epochs * math.ceil(images.count / config.batch)


def _train(
    net: nn.Module, exact: nn.Module, masters: Masters, images: Training, config: Config, done: int
) -> Iterator[float]:
    """Train step by step from `done` on; yields the loss of each."""
    steps = steps_of(images, config)
    for step, batch in zip(range(done, steps), _batches_from(done, images, config), strict=True):
        loss = loss_of(net, exact, batch)
        loss.backward()
        masters.step(cosine(config.learning_rate, step, steps))
        yield float(loss.detach())


def _description(model: QuantModel, images: Training, config: Config) -> dict[str, Any]:
    """Return what decides the run, so that a checkpoint of it is found; of the images, their number and first batch."""
    return {
        "options": asdict(config),
        "model": nets_sha256({"net": quantized_net(model), "exact": model.exact_net}),
        "images": [images.count, tensors_sha256({"first": next(iter(images))})],
        "code": code_sha256(Path(__file__).parents[1]),
    }


def _loss_note(losses: Sequence[float]) -> str:
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    return f"{len(losses)} steps, loss {first:.4g} in the first tenth, {last:.4g} (other images) in the last"


def _trained(
    net: nn.Module, model: QuantModel, masters: Masters, images: Training, config: Config, watch: Watch
) -> tuple[list[float], tuple[str, ...]]:
    """Train `masters` in `net`, from a checkpoint if there is one; returns (losses by step, notes on the checkpoint)."""
    losses = list[float]()
    checkpoint = watch.checkpoint("qwt_star", lambda: _description(model, images, config))
    if state := checkpoint.load():
        masters.restore(state)
        losses += state["losses"]
    for loss in _train(net, model.exact_net, masters, images, config, len(losses)):
        losses.append(loss)
        if not math.isfinite(loss):
            break
        if len(losses) % config.save_every == 0:
            checkpoint.save({**masters.state(), "losses": losses})
        watch.at(len(losses), steps_of(images, config))
    checkpoint.remove()
    return losses, checkpoint.notes


def candidates(model: QuantModel, halves: Sequence[Half], config: Config, watch: Watch = UNWATCHED) -> Offer:
    """Offer `model` with its branches trained.

    Interrupted, the same call goes on from the checkpoint of `watch`, to the same numbers as without the interruption.
    """
    rate, why = (config.learning_rate, "given") if config.learning_rate else learning_rate_of(model)
    config, images = replace(config, learning_rate=rate), Training(halves)
    net = quantized_net(model)
    running = trained_parameters(net, model)
    if not running:
        return Offer([], ("nothing to train: no block has a branch",))
    masters = Masters(running)
    untrained = masters.values()
    losses, resumed = _trained(net, model, masters, images, config, watch)
    if not math.isfinite(losses[-1]):
        reason = f"the loss of step {len(losses)} is {losses[-1]}; try a smaller learning rate than {rate:g}"
        return Offer([], (f"dropped: {reason}", *resumed))
    values = masters.values()
    moved = sum(int((value != untrained[name]).sum()) for name, value in values.items())
    share = moved / sum(value.numel() for value in values.values())
    notes = (
        _loss_note(losses),
        f"learning rate {rate:g} ({why}), {share:.1%} of the FP16 numbers moved",
        *resumed,
    )
    tuned = with_values(model, values)
    return Offer([Candidate("trained branches", ((tuned, None), (None, None)), tuned)], notes)
