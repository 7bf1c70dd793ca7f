"""Activation scales: one pass of the float network over the calibration images, then calib/scales/threshold_search.py."""

import functools
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from calib.errors import UserError
from calib.grids import GELU_LEAST, Grid, Unrounded, input_grid, sides_of, twin_gelu
from calib.hooks import input_hooks
from calib.images.batches import Batches, Half, spread_with_sources
from calib.network.layer_rows import Extremes
from calib.precision import UNROUNDED
from calib.quant_model import QuantModel, StageRecord
from calib.scales.channel_scale import FoldScale, fold_scale
from calib.scales.threshold_search import RoundedInputs, candidates, search
from calib.statistics.observers import OBSERVERS, Histogram, amax_from_histogram
from calib.statistics.signed_ranges import REPQ, SignedHistogram, grid_from_histogram

CHOOSE_IMAGES = 8  # per part
JUDGE_IMAGES = 12  # per part


@dataclass(frozen=True)
class Config:
    """How an activation histogram becomes a scale."""

    observer: str = (
        "search"  # search | max | percentile | mse | entropy | repq; search = least error of the network's output
    )
    percentile: float = 0.0  # % of elements not clipped, used by `percentile` only; 0 = that of the network's structure

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
    """What one half of the images showed of the layers' inputs."""

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


def _fold_scales(model: QuantModel, half: Extremes) -> dict[str, FoldScale]:
    """Return how the half alone would have equalised, by layer."""
    found = {}
    for name, low in half.low.items():
        moved = next((each for each in model.moved if name in each.readers), None)
        exponent, centred = model.equalised.get(name, (0.0, False))
        found[name] = fold_scale(low, half.high[name], moved, exponent, centred, model.precision.zero_points)
    return found


def _behind_gelu(model: QuantModel) -> list[str]:
    """Layers whose inputs take PTQ4ViT's twin grid."""
    if model.precision.gelu != "twin":
        return []
    return [name for name in model.layers if name in model.structure.after_gelu]


def _check_gelu(layers: Iterable[str], observed: Iterable[Observed]) -> None:
    """Raises UserError for a layer that reads less than any GELU returns."""
    for half, name in itertools.product(observed, layers):
        if (low := float(half.extremes.low[name].min())) < GELU_LEAST:
            raise UserError(
                f"[precision] gelu 'twin': layer '{name}' reads {low:.3f}, which no GELU returns; expected a network with "
                f"GELU and a recipe without [equalise], which scales what it returns"
            )


def _open_layers(model: QuantModel) -> list[str]:
    """Layers to be quantized whose input has no quantizer yet."""
    return [name for name in model.layers if f"{name}:input" not in model.quantizers]


def _with_asymmetric_inputs(model: QuantModel, halves: Sequence[Half], config: Config) -> QuantModel:
    """`model` with an asymmetric `:input` quantizer for every layer that has none yet, from all images together."""
    start = time.perf_counter()
    histograms = {name: SignedHistogram() for name in _open_layers(model)}
    with input_hooks(model.net, histograms, lambda name, _layer, x: histograms[name].update(x)), torch.inference_mode():
        for batch in itertools.chain(*halves):
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


def _whole(observed: Sequence[Observed]) -> Observed:
    """Return what all halves showed together."""
    histograms = {
        name: functools.reduce(Histogram.merge, (half.histograms[name] for half in observed))
        for name in observed[0].histograms
    }
    return Observed(histograms, functools.reduce(Extremes.merge, (half.extremes for half in observed)))


def _searched(
    model: QuantModel, halves: Sequence[Half], observed: Sequence[Observed]
) -> tuple[list[dict[str, float]], str]:
    """Return (thresholds by layer, of each half and then of all images; how they were chosen)."""
    offers = [
        {
            name: candidates(histogram, model.bits(name).input, model.precision.inputs < 8)
            for name, histogram in found.histograms.items()
        }
        for found in (*observed, _whole(observed))
    ]
    others = [halves[index - 1] for index in range(len(halves))]
    inputs = RoundedInputs(
        model,
        [_fold_scales(model, half.extremes) for half in observed],
        [[spread_with_sources(part, CHOOSE_IMAGES) for part in half.parts] for half in others],
        [[spread_with_sources(part, JUDGE_IMAGES) for part in half.parts] for half in others],
    )
    picks, _, how = search(inputs, offers[:-1])
    return [{name: offer[picks[name]] for name, offer in of.items()} for of in offers], how


def _by_observer(model: QuantModel, observed: Sequence[Observed], config: Config) -> tuple[list[dict[str, float]], str]:
    """Return (thresholds by layer, of each half and then of all images; how they were chosen)."""
    found = [
        {
            name: amax_from_histogram(histogram, config.observer, config.percentile, model.bits(name).input)
            for name, histogram in half.histograms.items()
        }
        for half in (*observed, _whole(observed))
    ]
    return found, f"by '{config.observer}'"


def _with_symmetric_inputs(model: QuantModel, halves: Sequence[Half], config: Config) -> QuantModel:
    """Return `model` with an `:input` quantizer from a clipping threshold for every layer that has none yet."""
    start = time.perf_counter()
    behind_gelu = _behind_gelu(model)
    layers = _open_layers(model)
    ranged = layers if config.observer == "search" else behind_gelu
    observed = [_observe(model.net, layers, half, ranged) for half in halves]
    _check_gelu(behind_gelu, observed)
    search_here = config.observer == "search"
    found, how = _searched(model, halves, observed) if search_here else _by_observer(model, observed, config)
    *by_half, thresholds = found
    extremes = _whole(observed).extremes

    def grid(name: str, amax: float) -> Grid:
        bits = model.bits(name).input
        if name in behind_gelu:
            return twin_gelu(amax, bits)
        sides = sides_of(extremes.low[name], extremes.high[name]) if model.precision.zero_points else None
        return input_grid(amax, bits, sides)

    quantizers = {f"{name}:input": grid(name, amax) for name, amax in thresholds.items()}
    notes = (f"{len(quantizers)} activation scales {how}",)
    record = StageRecord("calibrate", asdict(config), time.perf_counter() - start, notes=notes)
    half_thresholds = {name: tuple(found[name] for found in by_half) for name in thresholds}
    return replace(model.with_quantizers(quantizers), half_thresholds=half_thresholds).with_record(record)


def calibrate(model: QuantModel, halves: Sequence[Half], config: Config) -> QuantModel:
    """Return `model` with an `:input` quantizer for every layer to be quantized.

    All calibration images together give the scales; `observer = "search"` chooses how, by trying the thresholds of each half
    on the other (calib/scales/threshold_search.py). What the other observers mean for inputs with zero points is in
    calib/statistics/signed_ranges.py. Raises UserError where [precision] asks for the grid of GELU outputs and a layer reads
    something else, and for an observer that does not know ranges of the kind asked for.
    """
    config = replace(config, percentile=config.percentile or model.structure.percentile)
    if model.precision.zero_points and config.observer != "search":
        return _with_asymmetric_inputs(model, halves, config)
    if config.observer == REPQ:
        raise UserError(
            f"[calibrate] observer '{REPQ}' is for inputs that round with zero points: set them in [precision]"
        )
    return _with_symmetric_inputs(model, halves, config)
