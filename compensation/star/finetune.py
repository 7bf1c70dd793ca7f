"""QwT*: branches, and with labels the classifier, trained for one epoch on top of the closed form (Fu et al., appendix A).

    loss = CE(logits, labels) + weight mean_batch sum_features |f - f_Z|^2

f is the penultimate feature of the exact network, f_Z that of the quantized one (cls token or pooled map; of a network
without classifier its output). Without labels the second term is all. Everything else is frozen: integers, scales, norms.
Gradients pass through rounding (calib/network/qdq.py), and what trains runs in FP16 (compensation/star/masters.py).

What the paper leaves open, and what is done here: the squares are summed over features and averaged over the batch; the
rate falls along a cosine; images are not augmented.

The result is kept only if the output comes nearer to the float network's on images that did not train. With labels that is
a strict judge, for labels pull the output away from it: the cross-entropy on those images is told beside it.
"""

import itertools
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib.errors import UserError
from calib.images.batches import Batches
from calib.judge.held_out import MARGIN_DB, sqnr_db
from calib.network.qdq import quantized_net
from calib.quant_model import QuantModel, StageRecord
from calib.store.kept_files import nets_sha256, tensors_sha256
from calib.store.provenance import code_sha256
from calib.store.watch import UNWATCHED, Watch
from compensation.sizes import engine_bytes
from compensation.star.masters import Masters
from compensation.star.minibatches import Minibatch, minibatches
from compensation.star.trainable import trained_parameters, with_values, zero_branches

# (start of the name of timm's architecture or else of our family, AdamW's rate, where it comes from); the first that fits
LEARNING_RATES = (
    ("deit|swin", 5e-6, "QwT, appendix A"),
    ("vit", 1e-7, "QwT, appendix A"),
    ("resnet", 1e-5, "QwT, appendix A"),
    ("", 1e-5, "none published: as ResNet"),
)

JUDGED_BATCHES = 4  # at most, of those that do not train


@dataclass(frozen=True)
class Config:
    """How long and how fast; the defaults are the paper's, made for the whole training set of ImageNet."""

    epochs: int = 1
    batch: int = 32
    learning_rate: float = 0.0  # of AdamW at the start; 0 = the family's, which barely moves on a few hundred images
    feature_weight: float = 1.0  # of the feature term, beside the cross-entropy
    held_out: float = 0.125  # share of the batches, at the end of the images, that do not train
    all_blocks: bool = False  # blocks without a branch start with one of zeros (for QAT, where the closed form hurts)
    window: int = 512  # images in memory among which the next is drawn
    save_every: int = 50  # steps between checkpoints
    seed: int = 0  # of the order of the images

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "window", "save_every"):
            if (number := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {number}: expected 1 or more")
        for name in ("learning_rate", "feature_weight"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} is {value}: expected a number of at least 0")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}: expected a share between 0 and 1")


@dataclass(frozen=True)
class Split:
    """The first `batches` of the images, `count` in all, train; what follows judges."""

    images: Batches
    batches: int
    count: int

    def training(self) -> Iterator[Tensor]:
        """Batches that train."""
        return itertools.islice(self.images, self.batches)

    def held_out(self) -> list[Tensor]:
        """Batches that judge, as many as `sqnr_db` looks at."""
        return list(itertools.islice(self.images, self.batches, self.batches + JUDGED_BATCHES))


def split_of(images: Batches, size: int, share: float) -> Split:
    """`images`, in batches of `size`, with the last `share` of them held out. Raises UserError for a single batch."""
    if len(images) < 2:
        raise UserError(
            "fine-tuning got a single batch of images: expected two or more, to train on some and judge on others; "
            "add images"
        )
    batches = max(1, len(images) - max(1, round(len(images) * share)))
    return Split(images, batches, batches * size)  # the one batch that may be smaller is held out


def learning_rate_of(model: QuantModel) -> tuple[float, str]:
    """(the rate for this kind of network, where it comes from)."""
    architecture = (getattr(model.float_net, "pretrained_cfg", None) or {}).get("architecture", model.family.name)
    return next((rate, why) for start, rate, why in LEARNING_RATES if re.match(start, architecture))


def cosine(rate: float, step: int, steps: int) -> float:
    """The learning rate of `step`: `rate` at 0, 0 at `steps`."""
    return rate * (1 + math.cos(math.pi * step / steps)) / 2


def loss_of(net: Any, exact: Any, batch: Minibatch, feature_weight: float) -> Tensor:
    """The loss of the quantized `net` against the `exact` one (and the labels) on one batch, a tensor of one number."""
    with torch.no_grad():
        target = exact.forward_head(exact.forward_features(batch.images), pre_logits=True)
    features = net.forward_features(batch.images)
    difference = net.forward_head(features, pre_logits=True) - target
    distance = feature_weight * difference.square().sum(1).mean()
    if batch.labels is None:
        return distance
    return F.cross_entropy(net.forward_head(features), batch.labels) + distance


def _batches_from(step: int, split: Split, labels: Sequence[int] | None, config: Config) -> Iterator[Minibatch]:
    """The mini-batches of all epochs from `step` on."""
    first, done = divmod(step, math.ceil(split.count / config.batch))
    for epoch in range(first, config.epochs):
        order = config.seed + epoch
        batches = minibatches(split.training(), labels, config.batch, config.window, order)
        yield from itertools.islice(batches, done if epoch == first else 0, None)


def _train(
    net: nn.Module, exact: nn.Module, masters: Masters, split: Split, labels: Sequence[int] | None, config: Config, done: int
) -> Iterator[float]:  # fmt: skip
    """Train step by step from `done` on; yields the loss of each."""
    steps = config.epochs * math.ceil(split.count / config.batch)
    for step, batch in zip(range(done, steps), _batches_from(done, split, labels, config), strict=True):
        loss = loss_of(net, exact, batch, config.feature_weight)
        loss.backward()
        masters.step(cosine(config.learning_rate, step, steps))
        yield float(loss.detach())


def _check_labels(labels: Sequence[int], images: Batches, size: int, net: nn.Module) -> None:
    classes = int(getattr(net, "num_classes", 0))
    if not classes:
        raise UserError("labels were given to a network without a classifier: expected none; train without labels")
    if not (len(images) - 1) * size < len(labels) <= len(images) * size:
        raise UserError(f"{len(labels)} labels do not fit {len(images)} batches of {size} images: give one per image")
    if wrong := [label for label in labels if not 0 <= label < classes]:
        raise UserError(f"label {wrong[0]} is no class of the network: expected 0..{classes - 1}; check the folders")


def _description(
    model: QuantModel, images: Batches, first: Tensor, labels: Sequence[int] | None, config: Config
) -> dict[str, Any]:
    """What decides the run, so that a checkpoint of it is found; of the images, their number and first batch."""
    return {
        "options": asdict(config),
        "model": nets_sha256({"net": quantized_net(model), "exact": model.exact_net}),
        "images": [len(images), tensors_sha256({"first": first})],
        "labels": None if labels is None else tensors_sha256({"labels": torch.tensor(labels)}),
        "code": code_sha256(Path(__file__).parents[1]),
    }


def _adopt_if_better(model: QuantModel, tuned: QuantModel, held_out: Batches) -> tuple[QuantModel, float, float, str]:
    """(`tuned` or else `model`, dB before, dB after, what happened)."""
    before, after = sqnr_db([held_out], [model], [tuned])
    note = f"network output {after:.2f} dB against {before:.2f} dB on images held out"
    if after - before >= MARGIN_DB:  # false, too, where a difference is not a number
        return tuned, before, after, note
    return model, before, before, f"dropped: {note}"


@torch.inference_mode()
def _entropy(model: QuantModel, held_out: Sequence[Tensor], labels: Sequence[int]) -> float:
    """Cross-entropy of the quantized network; `labels` begin with the first of these images."""
    net = quantized_net(model)
    logits = torch.cat([net(batch) for batch in held_out])
    return float(F.cross_entropy(logits, torch.tensor(labels[: len(logits)])))


def _loss_note(losses: Sequence[float]) -> str:
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    return f"{len(losses)} steps, loss {first:.4g} in the first tenth, {last:.4g} (other images) in the last"


def finetune(
    model: QuantModel,
    images: Batches,
    config: Config,
    labels: Sequence[int] | None = None,
    watch: Watch = UNWATCHED,
) -> QuantModel:
    """`model` with its branches trained, and with `labels` (a class per image) its classifier, if that helps.

    `images` come with those of one photograph next to each other: the last ones judge. Interrupted, the same call goes on
    from the checkpoint of `watch`, to the same numbers as without the interruption. Raises UserError for labels that do not
    fit and fewer than two batches; ValueError if `all_blocks` meets blocks that are no chain.
    """
    start = time.perf_counter()
    first = next(iter(images))
    split = split_of(images, len(first), config.held_out)
    if labels is not None:
        _check_labels(labels, images, len(first), model.float_net)
    rate, why = (config.learning_rate, "given") if config.learning_rate else learning_rate_of(model)
    config = replace(config, learning_rate=rate)
    zeros = zero_branches(model, first) if config.all_blocks else {}
    begun = replace(model, branches={**model.branches, **zeros})
    net = quantized_net(begun)
    running = trained_parameters(net, begun, classifier=labels is not None)

    def record(*notes: str, before: float | None = None, after: float | None = None, **details: Any) -> StageRecord:
        return StageRecord("qwt_star", asdict(config), time.perf_counter() - start, before, after, notes, details)

    if not running:
        return model.with_record(record("nothing to train: no block has a branch"))
    masters, losses = Masters(running), list[float]()
    untrained = masters.values()
    checkpoint = watch.checkpoint("qwt_star", lambda: _description(begun, images, first, labels, config))
    if state := checkpoint.load():
        masters.restore(state)
        losses += state["losses"]
    steps = config.epochs * math.ceil(split.count / config.batch)
    for loss in _train(net, begun.exact_net, masters, split, labels, config, len(losses)):
        losses.append(loss)
        if not math.isfinite(loss):
            reason = f"the loss of step {len(losses)} is {loss}; try a smaller learning rate than {rate:g}"
            return model.with_record(record(f"dropped: {reason}"))
        if len(losses) % config.save_every == 0:
            checkpoint.save({**masters.state(), "losses": losses})
        watch.at(len(losses), steps)
    checkpoint.remove()

    values, held_out = masters.values(), split.held_out()
    tuned = with_values(begun, values)
    result, before, after, note = _adopt_if_better(model, tuned, held_out)
    moved = sum(int((value != untrained[name]).sum()) for name, value in values.items())
    share = moved / sum(value.numel() for value in values.values())
    notes = [
        note,
        _loss_note(losses),
        f"learning rate {rate:g} ({why}), {share:.1%} of the FP16 numbers moved",
        *checkpoint.notes,
    ]
    if labels is not None:
        old, new = (_entropy(each, held_out, labels[split.count :]) for each in (model, tuned))
        notes.append(f"cross-entropy {new:.3f} against {old:.3f} on images held out")
    added = {name: {"form": "dense", "bytes": engine_bytes(zero)} for name, zero in zeros.items()}
    return result.with_record(record(*notes, before=before, after=after, kept=added if result is tuned else {}))
