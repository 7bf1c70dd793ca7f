"""Activation scales: one pass of the float network over the calibration images."""

import functools
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from calib.hooks import input_hooks
from calib.layer_rows import Samples, output_errors, sampled_inputs, weight_matrix
from calib.observers import OBSERVERS, Histogram, amax_from_histogram
from calib.quant_model import QuantModel, StageRecord
from calib.quantizer import fake_quantize, qparams_from_amax

# What `search` tries for all layers at once, beside the best per layer.
SEARCHED = (("max", 0.0), *(("percentile", p) for p in (99.9999, 99.999, 99.99, 99.9)), ("mse", 0.0), ("entropy", 0.0))
MARGIN = 1.25  # of the maximum: new photographs exceed it
PER_LAYER = "per layer"
FOLD_THRESHOLDS = "fold_thresholds"  # in the record's details: what each fold alone would give, by layer


class Batches(Protocol):
    """Re-iterable batches (B, 3, H, W) float32 of known number."""

    def __iter__(self) -> Iterator[Tensor]: ...
    def __len__(self) -> int: ...


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


def candidates(histogram: Histogram) -> dict[str, float]:
    """Clipping thresholds worth trying, by name."""
    found = {
        f"{observer} {percentile:g}".removesuffix(" 0"): amax_from_histogram(histogram, observer, percentile)
        for observer, percentile in SEARCHED
    }
    return found | {f"max x{MARGIN:g}": histogram.amax * MARGIN}


def best_for_layer(layer: nn.Module, histograms: Sequence[Histogram], rows: Sequence[Tensor]) -> str:
    """The candidate with the least error of the layer's output: threshold from one fold, rows from another."""
    weight = weight_matrix(layer)
    error: defaultdict[str, float] = defaultdict(float)
    for index, histogram in enumerate(histograms):
        offers = candidates(histogram)
        for candidate, found in zip(offers, output_errors(rows[index - 1], weight, offers.values()), strict=True):
            error[candidate] += found
    return min(error, key=lambda candidate: error[candidate])


@contextmanager
def rounded_inputs(net: nn.Module, thresholds: Mapping[str, float]) -> Iterator[None]:
    """While open, the inputs of the layers named round to 8 bits at their threshold."""
    params = {name: qparams_from_amax(torch.tensor(amax)) for name, amax in thresholds.items()}
    with input_hooks(net, params, lambda name, _layer, x: fake_quantize(x, params[name])):
        yield


@dataclass(frozen=True)
class Observed:
    """What one fold showed: histograms and samples of the layers' inputs."""

    histograms: dict[str, Histogram]
    samples: Samples


def _search(model: QuantModel, observed: Sequence[Observed], folds: Sequence[Batches]) -> tuple[dict[str, str], str]:
    """(candidate by layer, what was found), by the network's output when all its inputs round.

    A layer's own error is no judge of this: in a transformer it favours clipping the few huge activations that later
    layers live on. Thresholds come from one fold, the images they are judged on from the next.
    """
    layers = list(observed[0].histograms)
    each = {
        name: best_for_layer(
            model.net.get_submodule(name),
            [o.histograms[name] for o in observed],
            [o.samples.of(name) for o in observed],
        )
        for name in layers
    }
    choices = {name: dict.fromkeys(layers, name) for name in candidates(observed[0].histograms[layers[0]])}
    choices[PER_LAYER] = each
    noise: defaultdict[str, float] = defaultdict(float)
    signal = 0.0
    with torch.inference_mode():
        for index, fit in enumerate(observed):
            images = next(iter(folds[index - 1]))
            exact = model.float_net(images)
            signal += float(exact.pow(2).sum())
            offers = {name: candidates(histogram) for name, histogram in fit.histograms.items()}
            for choice, picks in choices.items():
                with rounded_inputs(model.net, {name: offers[name][pick] for name, pick in picks.items()}):
                    noise[choice] += float((model.net(images) - exact).pow(2).sum())
    ranked = sorted(noise, key=lambda choice: noise[choice])
    shown = ", ".join(f"{choice} {_db(signal, noise[choice]):.1f} dB" for choice in ranked)
    return choices[ranked[0]], f"by '{ranked[0]}' ({shown} on other photographs)"


def _db(signal: float, noise: float) -> float:
    return 10 * math.log10(signal / noise) if signal and noise else math.inf


def _observe(net: nn.Module, layers: Sequence[str], batches: Batches) -> Observed:
    with (
        observed_inputs(net, layers) as histograms,
        sampled_inputs(net, layers, len(batches)) as samples,
        torch.inference_mode(),
    ):
        for batch in batches:
            net(batch)
    return Observed(histograms, samples)


def calibrate(model: QuantModel, folds: Sequence[Batches], config: Config) -> QuantModel:
    """`model` with an `:input` site for every layer to be quantized.

    `folds` are parts of the calibration set without a common photograph; all of them together give the scales, and
    `observer = "search"` chooses how by judging each fold's thresholds on another.
    """
    start = time.perf_counter()
    config = replace(config, percentile=config.percentile or model.family.percentile)
    observed = [_observe(model.net, model.family.layers(model.net), batches) for batches in folds]
    whole = {
        name: functools.reduce(Histogram.merge, (fold.histograms[name] for fold in observed))
        for name in observed[0].histograms
    }
    picks, how = _search(model, observed, folds) if config.observer == "search" else ({}, f"by '{config.observer}'")

    def threshold(name: str, histogram: Histogram) -> float:
        if name in picks:
            return candidates(histogram)[picks[name]]
        return amax_from_histogram(histogram, config.observer, config.percentile)

    thresholds = {name: threshold(name, histogram) for name, histogram in whole.items()}
    by_fold = {name: [threshold(name, fold.histograms[name]) for fold in observed] for name in whole}
    sites = {f"{name}:input": qparams_from_amax(torch.tensor(amax)) for name, amax in thresholds.items()}
    notes = (f"{len(sites)} activation scales {how}",)
    seconds = time.perf_counter() - start
    record = StageRecord("calibrate", asdict(config), seconds, notes=notes, details={FOLD_THRESHOLDS: by_fold})
    return model.with_sites(sites).with_record(record)
