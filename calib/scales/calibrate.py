"""Activation scales: one pass of the float network over the calibration images, then calib/scales/threshold_search.py."""

import functools
import itertools
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from calib.errors import UserError
from calib.grids import GELU_LEAST, Grid, Unrounded, input_grid, sides_of, twin_gelu
from calib.hooks import input_hooks
from calib.images.batches import Batches, spread_images
from calib.network.layer_rows import Extremes
from calib.precision import UNROUNDED
from calib.quant_model import QuantModel, StageRecord
from calib.scales.channel_scale import FoldScale, fold_scale
from calib.scales.equalise import EQUALISED
from calib.scales.threshold_search import Judge, candidates, search
from calib.statistics.observers import OBSERVERS, Histogram, amax_from_histogram
from calib.statistics.signed_ranges import REPQ, SignedHistogram, grid_from_histogram

JUDGE_IMAGES = 8  # per fold
FOLD_THRESHOLDS = "fold_thresholds"  # in the record's details: what each fold alone would give, by layer


@dataclass(frozen=True)
class Config:
    """How an activation histogram becomes a scale."""

    observer: str = (
        "search"  # search | max | percentile | mse | entropy | repq; search = what serves the network's output best
    )
    percentile: float = 0.0  # % of elements not clipped, used by `percentile` only; 0 = the family's

    def __post_init__(self) -> None:
        if self.observer not in (known := ("search", *OBSERVERS, REPQ)):
            raise ValueError(f"observer '{self.observer}' is not one of {', '.join(known)}")
        if not 0 <= self.percentile <= 100:
            raise ValueError(f"percentile {self.percentile} is not in 0..100")


@contextmanager
def observed_inputs(net: nn.Module, layers: Iterable[str]) -> Iterator[dict[str, Histogram]]:
    """While open, every forward pass of `net` adds the inputs of `layers` to the histograms yielded."""
    histograms = {name: Histogram() for name in layers}
    with input_hooks(net, histograms, lambda name, _layer, x: histograms[name].update(x)):
        yield histograms


@dataclass(frozen=True)
class Observed:
    """What one fold showed of the layers' inputs."""

    histograms: dict[str, Histogram]
    extremes: Extremes


def _observe(net: nn.Module, layers: Sequence[str], batches: Batches, ranged: Sequence[str]) -> Observed:
    """`ranged`: the layers whose channels' extremes are wanted."""
    extremes = Extremes()
    with (
        observed_inputs(net, layers) as histograms,
        input_hooks(net, ranged, extremes.add),
        torch.inference_mode(),
    ):
        for batch in batches:
            net(batch)
    return Observed(histograms, extremes)


def _fold_scales(model: QuantModel, fold: Extremes) -> dict[str, FoldScale]:
    """How the fold alone would have equalised, by layer."""
    details = (record.details for record in model.history if record.stage == "equalise")
    equalised = next(details, {}).get(EQUALISED, {})
    found = {}
    for name, low in fold.low.items():
        moved = [each for each in model.moved if each.consumer == name]
        exponent, centred = equalised.get(name, (0.0, False))
        found[name] = fold_scale(low, fold.high[name], moved, exponent, centred, model.precision.zero_points)
    return found


def _behind_gelu(model: QuantModel) -> list[str]:
    """Layers whose inputs take PTQ4ViT's twin grid."""
    if model.precision.gelu != "twin":
        return []
    return [name for name in model.layers if re.fullmatch(model.family.after_gelu, name)]


def _check_gelu(layers: Iterable[str], observed: Iterable[Observed]) -> None:
    """Raises UserError for a layer that reads less than any GELU returns."""
    for fold, name in itertools.product(observed, layers):
        if (low := float(fold.extremes.low[name].min())) < GELU_LEAST:
            raise UserError(
                f"[precision] gelu 'twin': layer '{name}' reads {low:.3f}, which no GELU returns; expected a network with "
                f"GELU and a recipe without [equalise], which scales what it returns"
            )


def _open_layers(model: QuantModel) -> list[str]:
    """Layers to be quantized whose input has no quantizer yet."""
    return [name for name in model.layers if f"{name}:input" not in model.quantizers]


def _with_asymmetric_inputs(model: QuantModel, folds: Sequence[Batches], config: Config) -> QuantModel:
    """`model` with an asymmetric `:input` quantizer for every layer that has none yet, from all folds together."""
    start = time.perf_counter()
    histograms = {name: SignedHistogram() for name in _open_layers(model)}
    with input_hooks(model.net, histograms, lambda name, _layer, x: histograms[name].update(x)), torch.inference_mode():
        for batch in itertools.chain(*folds):
            model.net(batch)

    def grid(name: str) -> Grid:
        bits = model.bits(name).input
        if bits == UNROUNDED:
            return Unrounded()
        return grid_from_histogram(histograms[name], config.observer, config.percentile, bits)

    quantizers = {f"{name}:input": grid(name) for name in histograms}
    notes = (f"{len(quantizers)} asymmetric activation ranges by '{config.observer}'",)
    record = StageRecord("calibrate", asdict(config), time.perf_counter() - start, notes=notes)
    return model.with_quantizers(quantizers).with_record(record)


def calibrate(model: QuantModel, folds: Sequence[Batches], config: Config) -> QuantModel:
    """`model` with an `:input` quantizer for every layer to be quantized.

    `folds` are parts of the calibration set without a common photograph; all of them together give the scales, and
    `observer = "search"` chooses how by judging each fold's thresholds on another. What the others mean for inputs with zero
    points is in calib/statistics/signed_ranges.py. Raises UserError where [precision] asks for the grid of GELU
    outputs and a layer reads something else, and for an observer that does not know ranges of the kind asked for.
    """
    start = time.perf_counter()
    config = replace(config, percentile=config.percentile or model.family.percentile)
    if model.precision.zero_points and config.observer != "search":
        return _with_asymmetric_inputs(model, folds, config)
    if config.observer == REPQ:
        raise UserError(
            f"[calibrate] observer '{REPQ}' is for inputs that round with zero points: set them in [precision]"
        )
    layers = _open_layers(model)
    behind_gelu = _behind_gelu(model)
    ranged = layers if config.observer == "search" else behind_gelu
    observed = [_observe(model.net, layers, batches, ranged) for batches in folds]
    _check_gelu(behind_gelu, observed)
    whole = {
        name: functools.reduce(Histogram.merge, (fold.histograms[name] for fold in observed))
        for name in observed[0].histograms
    }
    by_fold = [fold.histograms for fold in observed]
    if config.observer == "search":
        offers = [
            {name: candidates(each, model.bits(name).input, model.precision.inputs < 8) for name, each in found.items()}
            for found in (*by_fold, whole)
        ]
        images = [spread_images(folds[index - 1], JUDGE_IMAGES) for index in range(len(folds))]
        judge = Judge(model, [_fold_scales(model, fold.extremes) for fold in observed], images)
        picks, how = search(judge, offers[:-1])
        chosen = [
            {name: offer[pick] for (name, pick), offer in zip(picks.items(), of.values(), strict=True)} for of in offers
        ]
    else:
        how = f"by '{config.observer}'"
        chosen = [
            {
                name: amax_from_histogram(each, config.observer, config.percentile, model.bits(name).input)
                for name, each in found.items()
            }
            for found in (*by_fold, whole)
        ]
    thresholds = chosen.pop()
    extremes = functools.reduce(Extremes.merge, (fold.extremes for fold in observed))

    def grid(name: str, amax: float) -> Grid:
        bits = model.bits(name).input
        if name in behind_gelu:
            return twin_gelu(amax, bits)
        sides = sides_of(extremes.low[name], extremes.high[name]) if model.precision.zero_points else None
        return input_grid(amax, bits, sides)

    quantizers = {f"{name}:input": grid(name, amax) for name, amax in thresholds.items()}
    notes = (f"{len(quantizers)} activation scales {how}",)
    details = {name: [found[name] for found in chosen] for name in whole}
    seconds = time.perf_counter() - start
    record = StageRecord("calibrate", asdict(config), seconds, notes=notes, details={FOLD_THRESHOLDS: details})
    return model.with_quantizers(quantizers).with_record(record)
