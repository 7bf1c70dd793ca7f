"""Cross-layer equalization: migrate per-channel scales between consecutive layers, so that channels have similar ranges.

TensorRT quantizes activations with one scale per tensor, so a channel with a small range next to one with a large range
keeps few levels. At every place of the network's structure (calib/structure/places.py) the range h_c of channel c becomes

    r_c = (h_c / mean h)^a         x' = (x - m) / r         (mean: geometric, so that nothing grows as a whole)

a = 1 is RepQ-ViT's scale reparametrisation in its symmetric form (eq. 8-10 with z = 0), a = 0.5 SmoothQuant's; in between,
difficulty is shared between x and the weight. The exponent, and whether to centre (m), are chosen per layer by what rounding
its input and weight does to the network's output, to first order (calib/judge/first_order.py), at the clipping
threshold that suits them best. A layer's own error chooses worse: in a transformer a few huge activations decide it.

Ranges come from one half of the calibration images, the images that choose from the other. Within one half a = 1 always
looks good, because no value exceeds its own channel's range; on new images the channels that fire rarely exceed theirs
several times over. The move itself keeps the function, so the judge sees its effect with the thresholds (calibrate).

`rule = "repq"` is RepQ-ViT itself (calib/scales/repq.py), for comparison: LayerNorms alone, asymmetric, nothing is judged.
"""

import copy
import functools
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from calib.errors import UserError
from calib.grids import Grid, Sides, input_grid, sides_of
from calib.hooks import input_hooks
from calib.images.batches import Half, spread_images
from calib.judge.first_order import Seen, output_gradients, output_noise
from calib.network.fp16_range import FP16_MAX
from calib.network.layer_rows import Extremes, Means, channel_axis, look_at_inputs, weight_matrix
from calib.network.rounded_layer import require_whole_channels
from calib.precision import UNROUNDED, LayerBits
from calib.quant_model import QuantModel, StageRecord
from calib.quantizer import channel_qparams
from calib.scales.channel_scale import FoldScale, channel_scale
from calib.scales.repq import Reparametrised, channel_ranges, reparametrised
from calib.structure.moves import FRONT, INSERT, NORM, Moved, Place, along_inputs, move
from calib.structure.proof import preserving
from calib.structure.structure import Structure

RULES = ("search", "repq")
REPQ_IMAGES = 32  # the paper's one batch
# clipping thresholds tried, of the range; the final one is calibrate's business
THRESHOLDS = (0.6, 0.8, 1.0, 1.25, 1.6)
FEW_BITS = (0.25, 0.4)  # where levels are few, clipping pays
CHOOSE_IMAGES = 8  # per half
FP16_MARGIN = 8.0  # new images exceed what calibration saw


@dataclass(frozen=True)
class Config:
    """Which exponents are tried; `exponents = [0.0]` and `shift = false` switch the stage off."""

    exponents: tuple[float, ...] = (0.0, 0.3, 0.5, 0.7, 0.9)
    shift: bool = True  # try centring each channel where a shift can move
    rule: str = "search"  # search | repq, which has no further options and needs [precision] zero_points

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule '{self.rule}' is not one of {', '.join(RULES)}")


Candidate = tuple[float, bool]  # exponent, centred


def thresholds(bits: int) -> tuple[float, ...]:
    """Those tried for an input of so many bits."""
    return THRESHOLDS if bits >= 8 else (*FEW_BITS, *THRESHOLDS)


def grids_of(amax: float, bits: int, sides: Sides | None) -> list[Grid]:
    """The grid of an input with max |x| = `amax` at each of `thresholds`."""
    return [input_grid(amax * threshold, bits, sides) for threshold in thresholds(bits)]


def input_noise(
    x: Tensor, gradients: Tensor, scale: FoldScale, grids: Sequence[Grid], axis: int, images: int
) -> Tensor:
    """Return the squared output error of rounding `x`, to first order, on each of `grids`, float64; see `output_noise`."""
    centre, factor = scale.along(x, axis)
    scaled, slopes = (x - centre) * factor, gradients / factor
    return torch.stack([output_noise(slopes, grid.fake_quantize(scaled) - scaled, images) for grid in grids]).double()


def weight_noise(layer: nn.Module, squares: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the squared output error (), float64, of rounding the weight of `layer` when `scale` (C,) divides its input.

    `squares`: sum of (dr.y / dW)^2 around the mean input, as biases compensate for the rest (calib/methods/rtn.py).
    Every weight has an error of its own, uniform within its channel's step.
    """
    along = along_inputs(layer, scale)
    step = channel_qparams(layer.get_parameter("weight") * along, bits).scale
    return (squares / along.square()).flatten(1).sum(1).double() @ step.double().square() / 12


class Trial:
    """Candidates for the scale of what one layer reads: ranges of one half, tried on images of the other."""

    def __init__(
        self, layer: nn.Module, low: Tensor, high: Tensor, candidates: Sequence[Candidate], bits: LayerBits,
        zero_points: bool = False,
    ) -> None:  # fmt: skip
        self.layer, self.axis, self.bits = layer, channel_axis(layer), bits
        self.scales: dict[Candidate, tuple[Tensor, FoldScale, list[Grid]]] = {}
        for candidate in candidates:
            scale, shift = channel_scale(low, high, *candidate)
            ends = (low - shift) / scale, (high - shift) / scale
            fold = FoldScale(shift, 1 / scale, 1.0, sides_of(*ends) if zero_points else None)
            amax = float(torch.maximum(-ends[0], ends[1]).max())
            self.scales[candidate] = scale, fold, grids_of(amax, bits.input, fold.sides)

    def noise(self, seen: Seen, name: str) -> dict[Candidate, Tensor]:
        """Return the squared output error at each of `thresholds` for every candidate; `name` is that of the layer."""
        x, gradients = seen.inputs[name], seen.gradients[name]
        return {
            candidate: input_noise(x, gradients, scale, grids, self.axis, seen.images)
            + weight_noise(self.layer, seen.weights[name], factors, self.bits.weight)
            for candidate, (factors, scale, grids) in self.scales.items()
        }


def _noise(
    model: QuantModel,
    shifts: Mapping[str, bool],
    halves: Sequence[Half],
    ranges: Sequence[Extremes],
    means: Sequence[Means],
    config: Config,
) -> dict[str, dict[Candidate, Tensor]]:
    """Return the noise on the images that choose at each of `thresholds`, by layer and (exponent, centred).

    `shifts`: by layer, whether it can be centred.
    """
    total: dict[str, dict[Candidate, Tensor]] = {name: {} for name in shifts}
    if not total:
        return {}
    candidates = {
        name: [(a, m) for m in ((False, True) if shift and config.shift else (False,)) for a in config.exponents]
        for name, shift in shifts.items()
    }
    for index, (found, mean) in enumerate(zip(ranges, means, strict=True)):
        trials = {
            name: Trial(
                model.net.get_submodule(name),
                found.low[name],
                found.high[name],
                candidates[name],
                model.bits(name),
                model.precision.zero_points,
            )
            for name in shifts
        }
        images = spread_images(halves[index - 1], CHOOSE_IMAGES)
        around = {name: mean.of(name) for name in shifts}
        for seen in output_gradients(model.net, list(shifts), images, weights_around=around):
            with torch.no_grad():
                for name, trial in trials.items():
                    noise = trial.noise(seen, name)
                    for candidate, of_image in noise.items():
                        total[name][candidate] = total[name].get(candidate, 0.0) + of_image
    return total


def _least(noises: Sequence[Mapping[Candidate, Tensor]]) -> Candidate:
    """Return the candidate with the least noise over all readers of a place, each at its best threshold.

    Ties go to the one that changes least.
    """
    return min(noises[0], key=lambda each: sum(float(noise[each].min()) for noise in noises))


def quantized_readers(model: QuantModel) -> dict[Place, tuple[str, ...]]:
    """Return the layers to be quantized that read at each place where scales can move, if there are any."""
    layers = {*model.layers}
    found = {place: tuple(name for name in place.readers if name in layers) for place in model.structure.places}
    return {place: readers for place, readers in found.items() if readers}


def _move_all(net: nn.Module, structure: Structure, moved: Iterable[Moved]) -> None:
    """Move these scales and shifts, each at a place of `structure` (edits `net`)."""
    places = {place.readers: place for place in structure.places}
    for each in moved:
        move(net, places[each.readers], each.scale, each.shift)


def apply_moves(model: QuantModel, moved: Iterable[Moved]) -> QuantModel:
    """`model` with these scales and shifts moved, each at a place of its structure."""
    net, moved = copy.deepcopy(model.net), tuple(moved)
    _move_all(net, model.structure, moved)
    return replace(model, net=net, exact_net=net, moved=(*model.moved, *moved))


@torch.no_grad()
def largest_by_input(layer: nn.Module) -> Tensor:
    """Return the largest |weight| (C,) that meets each input channel of a Linear or Conv2d."""
    groups = weight_matrix(layer).abs().amax(1)
    channels = groups.shape[0] * layer.get_parameter("weight").shape[1]
    return groups.reshape(channels, -1).amax(1)


@torch.no_grad()
def within_fp16(net: nn.Module, place: Place, reach: Tensor, scale: Tensor) -> Tensor:
    """Return `scale` (C,) held to what keeps weights and values at `place` within FP16, with a margin for new images.

    `reach` (C,): the largest |x - m| that calibration saw. Where a value is beyond that without any scale, 1 is allowed.
    """
    most = FP16_MAX / FP16_MARGIN
    least = reach / most
    if place.kind not in (INSERT, FRONT):
        weight = net.get_submodule(place.producer).get_parameter("weight")[list(place.rows)]
        least = torch.maximum(least, weight.abs().reshape(len(weight), -1).amax(1) / most)
    largest = torch.stack([largest_by_input(net.get_submodule(name)) for name in place.readers]).amax(0)
    return scale.clamp(least.clamp(max=1.0), (most / largest.clamp(min=torch.finfo(scale.dtype).tiny)).clamp(min=1.0))


def _sound(model: QuantModel, moved: Sequence[Moved], example: Tensor) -> tuple[list[Moved], tuple[str, ...]]:
    """Return (those of `moved` that leave the output on `example` as it is, notes on those that do not)."""
    apply = lambda net, some: _move_all(net, model.structure, some)  # noqa: E731
    kept, refused = preserving(model.net, moved, apply, example)
    notes = tuple(
        f"taken back: scales of '{each.readers[0]}' change the output by {apart:.1e}" for each, apart in refused
    )
    return list(kept), notes


def _repq(model: QuantModel, halves: Sequence[Half], config: Config) -> QuantModel:
    """`model` with RepQ-ViT's channel scales and shifts moved, and `:input` quantizers for the layers that read them."""
    if not model.precision.zero_points or model.precision.inputs == UNROUNDED:
        raise UserError("[equalise] rule 'repq' is for inputs that round with zero points: set them in [precision]")
    start = time.perf_counter()
    readers_at = quantized_readers(model)
    places = {readers[0]: place for place, readers in readers_at.items() if place.kind == NORM and place.shifts}
    images = torch.cat([spread_images(half, math.ceil(REPQ_IMAGES / len(halves))) for half in halves])
    found: dict[str, Reparametrised] = {}

    def look(name: str, _layer: nn.Module, x: Tensor) -> None:
        bits = model.bits(name).input
        found[name] = reparametrised(*channel_ranges(x.flatten(0, -2), bits), bits)

    with input_hooks(model.net, places, look), torch.no_grad():
        model.net(images)
    moved = [Moved(places[name].producer, places[name].readers, each.scale, each.shift) for name, each in found.items()]
    notes = (f"{len(moved)} LayerNorms reparametrised as in RepQ-ViT, on {len(images)} images",)
    record = StageRecord("equalise", asdict(config), time.perf_counter() - start, notes=notes)
    quantizers = {f"{reader}:input": each.grid for name, each in found.items() for reader in readers_at[places[name]]}
    return apply_moves(model, moved).with_quantizers(quantizers).with_record(record)


def equalise(model: QuantModel, halves: Sequence[Half], config: Config) -> QuantModel:
    """`model` with channel scales (and shifts) moved; its float function is unchanged up to float rounding.

    Raises UserError where `rule = "repq"` meets inputs that round without zero points, and where weights round in groups.
    """
    require_whole_channels(model)
    if config.rule == "repq":
        return _repq(model, halves, config)
    start = time.perf_counter()
    places = quantized_readers(model)
    shifts = {name: place.shifts and not place.attention for place, readers in places.items() for name in readers}
    ranges, means = [Extremes() for _ in halves], [Means() for _ in halves]
    for half, extremes, mean in zip(halves, ranges, means, strict=True):
        look_at_inputs(model.net, shifts, half, extremes, mean)
    whole = functools.reduce(Extremes.merge, ranges)
    noise = _noise(model, shifts, halves, ranges, means, config)
    chosen = {place: _least([noise[name] for name in readers]) for place, readers in places.items()}
    moved = []
    for place, readers in places.items():
        if any(chosen[place]):
            low = torch.stack([whole.low[name] for name in readers]).amin(0)
            high = torch.stack([whole.high[name] for name in readers]).amax(0)
            scale, shift = channel_scale(low, high, *chosen[place])
            scale = within_fp16(model.net, place, torch.maximum(high - shift, shift - low), scale)
            moved.append(Moved(place.producer, place.readers, scale, shift))
    moved, taken_back = _sound(model, moved, next(iter(halves[0]))[:1])
    kept = {each.readers for each in moved}
    equalised = {name: chosen[place] for place, readers in places.items() for name in readers if place.readers in kept}
    exponents = [chosen[place][0] for place in places if place.readers in kept]
    counts = ", ".join(f"{a:g} x{exponents.count(a)}" for a in sorted(set(exponents)))
    notes = (
        f"channel scales moved at {sum(map(bool, exponents))} of {len(places)} places, shifts at "
        f"{sum(bool(e.shift.any()) for e in moved)}; exponents of the scales {counts or 'none'}",
        *taken_back,
    )
    record = StageRecord("equalise", asdict(config), time.perf_counter() - start, notes=notes)
    return replace(apply_moves(model, moved), equalised=equalised).with_record(record)
