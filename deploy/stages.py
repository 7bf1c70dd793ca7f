"""The torch half after loading: what a recipe does to a float network, stage by stage.

`make engine` runs these stages and keeps what each decides; `make table` runs them for many recipes, which share the stages
they begin with. Whatever changes the network's function is a candidate, and the judge decides here, in one place, whether it
stays (calib/judge/held_out.py).
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from calib.attention.int8 import int8_attention
from calib.attention.simulated import calibrate_attention
from calib.device import CPU
from calib.images.batches import Batches, Half, Part
from calib.images.image_set import ImageSet
from calib.judge.held_out import Candidate, Offer, challenge
from calib.layerwise import fall_back, float_layers
from calib.layerwise.int8_products import int8_products
from calib.layerwise.int8_shortcuts import int8_shortcuts
from calib.methods import rtn
from calib.network.fold import fold_affine
from calib.quant_model import QuantModel, StageRecord
from calib.scales.calibrate import calibrate
from calib.scales.equalise import equalise
from calib.store.watch import UNWATCHED, Watch
from compensation import qwt
from compensation.star import finetune
from deploy.recipe import Recipe, method_module


@dataclass(frozen=True)
class CalibrationImages:
    """What the stages look at, and who is told of their progress.

    `example` (1, 3, H, W): any image, on the CPU. `halves` are on `device`, where the stages behind folding compute.
    """

    example: Tensor
    halves: Sequence[Half]
    watch: Watch = UNWATCHED
    device: torch.device = CPU
    kept: fall_back.Kept | None = None  # whether outputs keep the limit on accuracy that was given


def halves_of(images: ImageSet, batches: Callable[[ImageSet], Batches]) -> tuple[Half, Half]:
    """Return the halves of `images` with their roles; `batches` makes a set of images readable for the stages."""
    first, second = (
        Half((Part(batches(one), one.sources), Part(batches(other), other.sources))) for one, other in images.halves()
    )
    return first, second


@dataclass(frozen=True)
class Stage:
    """`run` gives the next model, its record appended. Stages of the same name and `options` do the same."""

    name: str
    options: Any
    run: Callable[[QuantModel, CalibrationImages], QuantModel] = field(compare=False)

    def __call__(self, model: QuantModel, images: CalibrationImages) -> QuantModel:
        """Run on the model's device: tensors that the stage makes are made there."""
        with contextlib.nullcontext() if model.device == CPU else model.device:
            return self.run(model, images)


def _on_halves(name: str, stage: Callable[..., QuantModel], options: Any) -> Stage:
    return Stage(name, options, lambda model, images: stage(model, images.halves, options))


def _fold(model: QuantModel, images: CalibrationImages) -> QuantModel:
    """Fold on the CPU, because the proofs compute in float64, which most GPUs do slowly; then go to the device."""
    return fold_affine(model, images.example).to(images.device)


FOLD = Stage("fold", None, _fold)


def scale_stages(recipe: Recipe) -> Iterator[Stage]:
    """Yield the stages that move channel scales and choose those of activations, on a folded network."""
    if recipe.equalise:
        yield _on_halves("equalise", equalise, recipe.equalise)
    if recipe.precision.attention != "float":
        yield Stage(
            "simulated attention", recipe.precision, lambda model, images: calibrate_attention(model, images.halves)
        )
    yield _on_halves("calibrate", calibrate, recipe.calibrate)


def judged(
    stage: str, options: Any, incumbent: Candidate, halves: Sequence[Half], offer: Callable[[], Offer],
    before_it: Sequence[str] = (),
) -> QuantModel:  # fmt: skip
    """Return the better of `incumbent` and what `offer` gives, fitted on all images, with a record of the decision.

    `before_it`: what is to be told of the incumbent.
    """
    start = time.perf_counter()
    candidates, notes, details = offer()
    kept, gain, happened = challenge(incumbent, candidates, halves)
    before, after = (gain.before_db, gain.after_db) if gain else (None, None)
    happened_notes = (happened,) if happened else ()
    record = StageRecord(
        stage,
        asdict(options),
        time.perf_counter() - start,
        before,
        after,
        (*happened_notes, *before_it, *notes),
        details,
    )
    return kept.whole.with_record(record)


def _round_weights(recipe: Recipe) -> Stage:
    """Return the stage of the recipe's method, whose candidates challenge rounding to nearest with corrected biases."""
    method, options = method_module(recipe.method), recipe.method_config

    def run(model: QuantModel, images: CalibrationImages) -> QuantModel:
        plain, told = rtn.nearest(model), ""
        if method is not rtn:
            plain, _, told = challenge(plain, [rtn.bias_corrected(plain.whole, images.halves)], images.halves)
        return judged(
            recipe.method, options, plain, images.halves,
            lambda: method.candidates(model, plain, images.halves, options, images.watch),
            [f"before it: {told}"] if told else [],
        )  # fmt: skip

    return Stage(recipe.method, options, run)


def _keep_float(options: float_layers.Config) -> Stage:
    def run(model: QuantModel, images: CalibrationImages) -> QuantModel:
        plain = Candidate.unfitted("all layers INT8", model)
        offer = lambda: float_layers.candidates(model, images.halves, options)  # noqa: E731
        return judged("keep_float", options, plain, images.halves, offer)

    return Stage("keep_float", options, run)


def _fall_back(limit: str) -> Stage:
    options = fall_back.Config(limit)

    def run(model: QuantModel, images: CalibrationImages) -> QuantModel:
        if images.kept is None:
            raise ValueError(f"nothing tells whether {limit} is kept")
        return fall_back.fall_back(model, images.halves, options, images.kept)

    return Stage("fall_back", options, run)


def _compensate(options: qwt.Config) -> Stage:
    def run(model: QuantModel, images: CalibrationImages) -> QuantModel:
        plain = Candidate.unfitted("no branches", model)
        return judged("qwt", options, plain, images.halves, lambda: qwt.candidates(model, images.halves, options))

    return Stage("compensate", options, run)


def _finetune(options: finetune.Config) -> Stage:
    def run(model: QuantModel, images: CalibrationImages) -> QuantModel:
        plain = Candidate.unfitted("branches in closed form", model)
        offer = lambda: finetune.candidates(model, images.halves, options, images.watch)  # noqa: E731
        return judged("qwt_star", options, plain, images.halves, offer)

    return Stage("finetune", options, run)


def repair_stages(recipe: Recipe, limit: str = "") -> Iterator[Stage]:
    """Yield the stages that round the weights and compensate for it, on a calibrated network.

    To keep a `limit` on accuracy, here in words, layers go back to FP16 before branches and INT8 between layers are tried.
    """
    yield _round_weights(recipe)
    if recipe.attention:
        yield _on_halves("attention", int8_attention, recipe.attention)
    if recipe.keep_float:
        yield _keep_float(recipe.keep_float)
    if limit:
        yield _fall_back(limit)
    if recipe.int8_shortcuts:
        yield _on_halves("int8_shortcuts", int8_shortcuts, recipe.int8_shortcuts)
    if recipe.int8_products:
        yield _on_halves("int8_products", int8_products, recipe.int8_products)
    if recipe.compensate:
        yield _compensate(recipe.compensate)
    if recipe.finetune:
        yield _finetune(recipe.finetune)


def stages(recipe: Recipe) -> tuple[Stage, ...]:
    """Return all stages of `recipe`, in order."""
    return (FOLD, *scale_stages(recipe), *repair_stages(recipe))


class Simulator:
    """Recipes on one network, in turn: each goes on from the last model that it shares with the recipe before it."""

    def __init__(self, model: QuantModel, images: CalibrationImages) -> None:
        self.model, self.images = model, images
        self.done: list[tuple[Stage, QuantModel]] = []

    def run(self, recipe: Recipe, watch: Watch = UNWATCHED) -> QuantModel:
        """Return the network after all stages of `recipe`, with their records."""
        if recipe.precision != self.model.precision:
            self.model, self.done = replace(self.model, precision=recipe.precision), []
        todo = stages(recipe)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1][0], zip(todo, self.done, strict=False)))
        del self.done[shared:]
        for stage in todo[shared:]:
            model = self.done[-1][1] if self.done else self.model
            self.done.append((stage, stage(model, replace(self.images, watch=watch))))
        return self.done[-1][1]
