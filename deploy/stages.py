"""The torch half after loading: what a recipe does to a float network, stage by stage.

`make engine` runs these stages with a cache around those that choose scales; `make table` runs them for many recipes, which
share the stages they begin with.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from torch import Tensor

from calib.attention import int8 as int8_attention
from calib.attention.simulated import calibrate_attention
from calib.images.batches import Batches
from calib.methods import rtn
from calib.network.fold import fold_affine
from calib.quant_model import QuantModel
from calib.scales.calibrate import calibrate
from calib.scales.equalise import equalise
from calib.store.watch import UNWATCHED, Watch
from compensation.qwt import compensate
from compensation.star.finetune import finetune
from deploy.recipe import Recipe, method_module


@dataclass(frozen=True)
class CalibrationImages:
    """What the stages look at, and who looks at them.

    `example` (1, 3, H, W): any image. `folds`: parts without a common photograph. `whole`: all, by photograph.
    """

    example: Tensor
    folds: Sequence[Batches]
    whole: Batches
    watch: Watch = UNWATCHED


@dataclass(frozen=True)
class Stage:
    """`run` gives the next model, its record appended. Stages of the same name and `options` do the same."""

    name: str
    options: Any
    run: Callable[[QuantModel, CalibrationImages], QuantModel] = field(compare=False)


def _on_folds(name: str, stage: Callable[..., QuantModel], options: Any) -> Stage:
    return Stage(name, options, lambda model, images: stage(model, images.folds, options))


FOLD = Stage("fold", None, lambda model, images: fold_affine(model, images.example))


def scale_stages(recipe: Recipe) -> Iterator[Stage]:
    """What moves channel scales and chooses those of activations, on a folded network."""
    if recipe.equalise:
        yield _on_folds("equalise", equalise, recipe.equalise)
    if recipe.attention:
        yield _on_folds("attention", int8_attention.prepare, recipe.attention)
    if recipe.precision.attention != "float":
        yield Stage(
            "simulated attention", recipe.precision, lambda model, images: calibrate_attention(model, images.folds)
        )
    yield _on_folds("calibrate", calibrate, recipe.calibrate)


def repaired(after: QuantModel, without: Callable[[], QuantModel]) -> QuantModel:
    """`after`, or `without()` with its last record if that says that the output on other photographs got worse."""
    record = after.history[-1]
    before_db, after_db = record.sqnr_before_db, record.sqnr_after_db
    if before_db is None or after_db is None or after_db >= before_db:
        return after
    note = f"rolled back: network output {after_db:.2f} dB against {before_db:.2f} dB on other photographs"
    record = replace(record, sqnr_after_db=before_db, notes=(*record.notes, note))
    return replace(without(), history=after.history[:-1]).with_record(record)


def _round_weights(recipe: Recipe) -> Stage:
    """The recipe's method; rounding to nearest where that serves the output better."""
    method = method_module(recipe.method)

    def run(model: QuantModel, images: CalibrationImages) -> QuantModel:
        rounded = method.reduce_error(model, images.folds, recipe.method_config, images.watch)
        return repaired(rounded, lambda: rtn.nearest(model, images.folds))

    return Stage(recipe.method, recipe.method_config, run)


def repair_stages(recipe: Recipe) -> Iterator[Stage]:
    """What rounds the weights and mends what rounding cost, on a calibrated network; a repair that harms is dropped."""
    yield _round_weights(recipe)
    if recipe.attention:
        yield _on_folds("choose attention", int8_attention.choose, recipe.attention)
    if options := recipe.compensate:
        yield Stage(
            "compensate",
            options,
            lambda model, images: repaired(compensate(model, images.folds, options), lambda: model),
        )
    if tuning := recipe.finetune:
        yield Stage(
            "finetune",
            tuning,
            lambda model, images: repaired(finetune(model, images.whole, tuning, watch=images.watch), lambda: model),
        )


def stages(recipe: Recipe) -> tuple[Stage, ...]:
    """All of them, in order."""
    return (FOLD, *scale_stages(recipe), *repair_stages(recipe))


class Simulator:
    """Recipes on one network, in turn: each goes on from the last model that it shares with the recipe before it."""

    def __init__(self, model: QuantModel, images: CalibrationImages) -> None:
        self.model, self.images = model, images
        self.done: list[tuple[Stage, QuantModel]] = []

    def run(self, recipe: Recipe, watch: Watch = UNWATCHED) -> QuantModel:
        """The network after all stages of `recipe`, with their records."""
        if recipe.precision != self.model.precision:
            self.model, self.done = replace(self.model, precision=recipe.precision), []
        todo = stages(recipe)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1][0], zip(todo, self.done, strict=False)))
        del self.done[shared:]
        for stage in todo[shared:]:
            model = self.done[-1][1] if self.done else self.model
            self.done.append((stage, stage.run(model, replace(self.images, watch=watch))))
        return self.done[-1][1]
