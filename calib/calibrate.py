"""Activation scales: one pass of the float network over the calibration images."""

import functools
import itertools
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from calib.decibels import decibels
from calib.grids import Grid, Unrounded, input_grid
from calib.hooks import input_hooks
from calib.layer_rows import Samples, output_errors, sampled_inputs, weight_matrix
from calib.observers import OBSERVERS, Histogram, amax_from_histogram
from calib.precision import INT8, UNROUNDED, LayerBits
from calib.quant_model import QuantModel, StageRecord
from calib.ranges import SignedHistogram, grid_from_histogram

# What `search` tries for all layers at once, beside the best per layer.
SEARCHED = (("max", 0.0), *(("percentile", p) for p in (99.9999, 99.999, 99.99, 99.9)), ("mse", 0.0), ("entropy", 0.0))
MARGIN = 1.25  # of the maximum: new photographs exceed it
PER_LAYER = "per layer"
JUDGE_IMAGES = 16  # per fold
FOLD_THRESHOLDS = "fold_thresholds"  # in the record's details: what each fold alone would give, by layer


class Batches(Protocol):
    """Re-iterable batches (B, 3, H, W) float32 of known number."""

    def __iter__(self) -> Iterator[Tensor]: ...
    def __len__(self) -> int: ...


def spread_images(batches: Batches, count: int) -> Tensor:
    """`count` images (or all, if there are fewer) taken evenly from `batches`: neighbours often share a photograph."""
    share = math.ceil(count / len(batches))
    taken = torch.cat([batch[:: max(len(batch) // share, 1)][:share] for batch in batches])
    return taken[:: max(len(taken) // count, 1)][:count]


@dataclass(frozen=True)
class Config:
    """How an activation histogram becomes a scale."""

    observer: str = (
        "search"  # search | max | percentile | mse | entropy; search = what serves the network's output best
    )
    percentile: float = 0.0  # % of elements not clipped, used by `percentile` only; 0 = the family's

    def __post_init__(self) -> None:
        if self.observer not in ("search", *OBSERVERS):
            raise ValueError(f"observer '{self.observer}' is not one of search, {', '.join(OBSERVERS)}")
        if not 0 <= self.percentile <= 100:
            raise ValueError(f"percentile {self.percentile} is not in 0..100")


@contextmanager
def observed_inputs(net: nn.Module, layers: Iterable[str]) -> Iterator[dict[str, Histogram]]:
    """While open, every forward pass of `net` adds the inputs of `layers` to the histograms yielded."""
    histograms = {name: Histogram() for name in layers}
    with input_hooks(net, histograms, lambda name, _layer, x: histograms[name].update(x)):
        yield histograms


def candidates(histogram: Histogram, bits: int = 8) -> dict[str, float]:
    """Clipping thresholds worth trying, by name."""
    found = {
        f"{observer} {percentile:g}".removesuffix(" 0"): amax_from_histogram(histogram, observer, percentile, bits)
        for observer, percentile in SEARCHED
    }
    return found | {f"max x{MARGIN:g}": histogram.amax * MARGIN}


def best_for_layer(
    layer: nn.Module, offers: Sequence[Mapping[str, float]], rows: Sequence[Tensor], bits: LayerBits = INT8
) -> str:
    """The candidate with the least error of the layer's output: threshold from one fold, rows from another."""
    weight = weight_matrix(layer)
    error: defaultdict[str, float] = defaultdict(float)
    for index, offer in enumerate(offers):
        for candidate, found in zip(offer, output_errors(rows[index - 1], weight, offer.values(), bits), strict=True):
            error[candidate] += found
    return min(error, key=lambda candidate: error[candidate])


@contextmanager
def rounded_inputs(net: nn.Module, grids: Mapping[str, Grid]) -> Iterator[None]:
    """While open, the inputs of the layers named round to their grid."""
    with input_hooks(net, grids, lambda name, _layer, x: grids[name].fake_quantize(x)):
        yield


@dataclass(frozen=True)
class Observed:
    """What one fold showed: histograms and samples of the layers' inputs."""

    histograms: dict[str, Histogram]
    samples: Samples


Offers = dict[str, dict[str, float]]  # layer -> candidate -> threshold


def _search(
    model: QuantModel, offers: Sequence[Offers], samples: Sequence[Samples], folds: Sequence[Batches]
) -> tuple[dict[str, str], str]:
    """(candidate by layer, what was found), by the network's output when all its inputs round. `offers`: by fold.

    A layer's own error is no judge of this: in a transformer it favours clipping the few huge activations that later
    layers live on. Thresholds come from one fold, the images they are judged on from the next.
    """
    each = {
        name: best_for_layer(
            model.net.get_submodule(name),
            [of_fold[name] for of_fold in offers],
            [rows.of(name) for rows in samples],
            model.bits(name),
        )
        for name in offers[0]
    }
    choices = {name: dict.fromkeys(offers[0], name) for name in next(iter(offers[0].values()))}
    choices[PER_LAYER] = each
    noise: defaultdict[str, float] = defaultdict(float)
    signal = 0.0
    with torch.inference_mode():
        for index, of_fold in enumerate(offers):
            images = spread_images(folds[index - 1], JUDGE_IMAGES)
            exact = model.float_net(images)
            signal += float(exact.pow(2).sum())
            for choice, picks in choices.items():
                grids = {name: input_grid(of_fold[name][pick], model.bits(name).input) for name, pick in picks.items()}
                with rounded_inputs(model.net, grids):
                    noise[choice] += float((model.net(images) - exact).pow(2).sum())
    ranked = sorted(noise, key=lambda choice: noise[choice])
    shown = ", ".join(f"{choice} {decibels(signal, noise[choice]):.1f} dB" for choice in ranked)
    return choices[ranked[0]], f"by '{ranked[0]}' ({shown} on other photographs)"


def _observe(net: nn.Module, layers: Sequence[str], batches: Batches, sampled: Sequence[str]) -> Observed:
    with (
        observed_inputs(net, layers) as histograms,
        sampled_inputs(net, sampled, len(batches)) as samples,
        torch.inference_mode(),
    ):
        for batch in batches:
            net(batch)
    return Observed(histograms, samples)


def _with_asymmetric_inputs(model: QuantModel, folds: Sequence[Batches], config: Config) -> QuantModel:
    """`model` with an asymmetric `:input` site for every layer that has none yet, from all folds together."""
    start = time.perf_counter()
    histograms = {name: SignedHistogram() for name in model.layers if f"{name}:input" not in model.sites}
    with input_hooks(model.net, histograms, lambda name, _layer, x: histograms[name].update(x)), torch.inference_mode():
        for batch in itertools.chain(*folds):
            model.net(batch)

    def grid(name: str) -> Grid:
        bits = model.bits(name).input
        if bits == UNROUNDED:
            return Unrounded()
        return grid_from_histogram(histograms[name], config.observer, config.percentile, bits)

    sites = {f"{name}:input": grid(name) for name in histograms}
    notes = (f"{len(sites)} asymmetric activation ranges by '{config.observer}'",)
    record = StageRecord("calibrate", asdict(config), time.perf_counter() - start, notes=notes)
    return model.with_sites(sites).with_record(record)


def calibrate(model: QuantModel, folds: Sequence[Batches], config: Config) -> QuantModel:
    """`model` with an `:input` site for every layer to be quantized.

    `folds` are parts of the calibration set without a common photograph; all of them together give the scales, and
    `observer = "search"` chooses how by judging each fold's thresholds on another. Inputs with zero points are not judged:
    calib/ranges.py says what `observer` means for them.
    """
    start = time.perf_counter()
    config = replace(config, percentile=config.percentile or model.family.percentile)
    if model.precision.zero_points:
        return _with_asymmetric_inputs(model, folds, config)
    layers = model.layers
    sampled = layers if config.observer == "search" else ()
    observed = [_observe(model.net, layers, batches, sampled) for batches in folds]
    whole = {
        name: functools.reduce(Histogram.merge, (fold.histograms[name] for fold in observed))
        for name in observed[0].histograms
    }
    by_fold = [fold.histograms for fold in observed]
    if config.observer == "search":
        offers = [
            {name: candidates(histogram, model.bits(name).input) for name, histogram in found.items()}
            for found in (*by_fold, whole)
        ]
        picks, how = _search(model, offers[:-1], [fold.samples for fold in observed], folds)
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
    sites = {f"{name}:input": input_grid(amax, model.bits(name).input) for name, amax in thresholds.items()}
    notes = (f"{len(sites)} activation scales {how}",)
    details = {name: [found[name] for found in chosen] for name in whole}
    seconds = time.perf_counter() - start
    record = StageRecord("calibrate", asdict(config), seconds, notes=notes, details={FOLD_THRESHOLDS: details})
    return model.with_sites(sites).with_record(record)
