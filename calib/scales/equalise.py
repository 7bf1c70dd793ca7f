"""Cross-layer equalization: migrate per-channel scales between consecutive layers, so that channels have similar ranges.

TensorRT quantizes activations with one scale per tensor, so a channel with a small range next to one with a large range
keeps few levels. For every `Move` of the family (calib/structure/moves.py) the range h_c of channel c becomes

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from calib.errors import UserError
from calib.grids import input_grid, sides_of
from calib.hooks import input_hooks
from calib.images.batches import Half, spread_images
from calib.judge.first_order import output_gradients, output_noise
from calib.network.layer_rows import Extremes, Means, along_inputs, channel_axis, look_at_inputs
from calib.precision import UNROUNDED, LayerBits
from calib.quant_model import QuantModel, StageRecord
from calib.quantizer import channel_qparams
from calib.scales.channel_scale import FoldScale, channel_scale
from calib.scales.repq import Reparametrised, channel_ranges, reparametrised
from calib.structure.moves import Move, Moved, Norm

RULES = ("search", "repq")
REPQ_IMAGES = 32  # the paper's one batch
# clipping thresholds tried, of the range; the final one is calibrate's business
THRESHOLDS = (0.6, 0.8, 1.0, 1.25, 1.6)
FEW_BITS = (0.25, 0.4)  # where levels are few, clipping pays
CHOOSE_IMAGES = 8  # per half


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


def input_noise(x: Tensor, gradients: Tensor, scale: FoldScale, amax: float, bits: int, axis: int) -> Tensor:
    """Return the squared output error of rounding `x`, to first order, at each of `thresholds`; see `output_noise`."""
    centre, factor = scale.along(x, axis)
    scaled, slopes = (x - centre) * factor, gradients / factor
    grids = [input_grid(amax * threshold, bits, scale.sides) for threshold in thresholds(bits)]
    return torch.tensor(
        [output_noise(slopes, grid.fake_quantize(scaled) - scaled) for grid in grids], dtype=torch.float64
    )


def weight_noise(layer: nn.Module, squares: Tensor, scale: Tensor, bits: int) -> float:
    """Return the squared output error of rounding the weight of `layer` when its input is divided by `scale` (C,).

    `squares`: sum of (dr.y / dW)^2 around the mean input, as biases compensate for the rest (calib/methods/rtn.py).
    Every weight has an error of its own, uniform within its channel's step.
    """
    along = along_inputs(layer, scale)
    step = channel_qparams(layer.get_parameter("weight") * along, bits).scale
    return float((squares / along.square()).flatten(1).sum(1).double() @ step.double().square()) / 12


class Trial:
    """Candidates for the scale of what one layer reads: ranges of one half, tried on images of the other."""

    def __init__(
        self, layer: nn.Module, low: Tensor, high: Tensor, candidates: Sequence[Candidate], zero_points: bool = False
    ) -> None:
        self.layer, self.axis = layer, channel_axis(layer)
        self.scales: dict[Candidate, tuple[Tensor, FoldScale, float]] = {}
        for candidate in candidates:
            scale, shift = channel_scale(low, high, *candidate)
            ends = (low - shift) / scale, (high - shift) / scale
            fold = FoldScale(shift, 1 / scale, 1.0, sides_of(*ends) if zero_points else None)
            self.scales[candidate] = scale, fold, float(torch.maximum(-ends[0], ends[1]).max())

    def noise(self, x: Tensor, gradients: Tensor, squares: Tensor, bits: LayerBits) -> dict[Candidate, Tensor]:
        """Return the squared output error at each of `thresholds` for every candidate; `x` is the layer's input."""
        return {
            candidate: input_noise(x, gradients, scale, reach, bits.input, self.axis)
            + weight_noise(self.layer, squares, factors, bits.weight)
            for candidate, (factors, scale, reach) in self.scales.items()
        }


def _chosen(
    model: QuantModel,
    shifts: Mapping[str, bool],
    halves: Sequence[Half],
    ranges: Sequence[Extremes],
    means: Sequence[Means],
    config: Config,
) -> dict[str, Candidate]:
    """Return (exponent, centred) by layer: the least noise on the images that choose; ties go to the one that changes least.

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
                model.precision.zero_points,
            )
            for name in shifts
        }
        images = spread_images(halves[index - 1], CHOOSE_IMAGES)
        around = {name: mean.of(name) for name in shifts}
        for seen in output_gradients(model.net, list(shifts), images, weights_around=around):
            with torch.no_grad():
                for name, trial in trials.items():
                    noise = trial.noise(seen.inputs[name], seen.gradients[name], seen.weights[name], model.bits(name))
                    for candidate, of_image in noise.items():
                        total[name][candidate] = total[name].get(candidate, 0.0) + of_image
    return {name: min(noise, key=lambda each: float(noise[each].min())) for name, noise in total.items()}


def _consume(layer: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """Make `layer` read (x - shift) / scale instead of x (edits it)."""
    weight = layer.get_parameter("weight").data
    if shift.any():
        moved = (weight * along_inputs(layer, shift)).flatten(1).sum(1)
        bias = getattr(layer, "bias", None)
        layer.bias = nn.Parameter(moved if bias is None else bias.data + moved, requires_grad=False)
    weight.mul_(along_inputs(layer, scale))


def placed_moves(model: QuantModel) -> Iterator[tuple[Move, str, str]]:
    """(move, producer, consumer) with full names, for every place of `model.net` where a move of the family applies."""
    for block, module in model.net.named_modules():
        for move in model.family.moves:
            if type(module).__name__ == move.block and move.applies(module):
                prefix = f"{block}." if block else ""
                yield move, prefix + move.producer, prefix + move.consumer


def apply_moves(model: QuantModel, moved: Iterable[Moved]) -> QuantModel:
    """`model` with these scales and shifts moved, each at a place where a move of the family applies."""
    net = copy.deepcopy(model.net)
    places = {(producer, consumer): move for move, producer, consumer in placed_moves(model)}
    moved = tuple(moved)
    for each in moved:
        places[each.producer, each.consumer].produce(net, each.producer, each.scale, each.shift)
        _consume(net.get_submodule(each.consumer), each.scale, each.shift)
    return replace(model, net=net, exact_net=net, moved=(*model.moved, *moved))


def _repq(model: QuantModel, halves: Sequence[Half], config: Config) -> QuantModel:
    """`model` with RepQ-ViT's channel scales and shifts moved, and `:input` quantizers for the layers that read them."""
    if not model.precision.zero_points or model.precision.inputs == UNROUNDED:
        raise UserError("[equalise] rule 'repq' is for inputs that round with zero points: set them in [precision]")
    start = time.perf_counter()
    places = {consumer: producer for move, producer, consumer in placed_moves(model) if isinstance(move, Norm)}
    images = torch.cat([spread_images(half, math.ceil(REPQ_IMAGES / len(halves))) for half in halves])
    found: dict[str, Reparametrised] = {}

    def look(name: str, _layer: nn.Module, x: Tensor) -> None:
        bits = model.bits(name).input
        found[name] = reparametrised(*channel_ranges(x.flatten(0, -2), bits), bits)

    with input_hooks(model.net, places, look), torch.no_grad():
        model.net(images)
    moved = [Moved(places[name], name, each.scale, each.shift) for name, each in found.items()]
    notes = (f"{len(moved)} LayerNorms reparametrised as in RepQ-ViT, on {len(images)} images",)
    record = StageRecord("equalise", asdict(config), time.perf_counter() - start, notes=notes)
    quantizers = {f"{name}:input": each.grid for name, each in found.items()}
    return apply_moves(model, moved).with_quantizers(quantizers).with_record(record)


def equalise(model: QuantModel, halves: Sequence[Half], config: Config) -> QuantModel:
    """`model` with channel scales (and shifts) moved; its float function is unchanged up to float rounding.

    Raises UserError where `rule = "repq"` meets inputs that round without zero points.
    """
    if config.rule == "repq":
        return _repq(model, halves, config)
    start = time.perf_counter()
    places = list(placed_moves(model))
    shifts = {consumer: move.shifts(model.net, producer, consumer) for move, producer, consumer in places}
    ranges, means = [Extremes() for _ in halves], [Means() for _ in halves]
    for half, extremes, mean in zip(halves, ranges, means, strict=True):
        look_at_inputs(model.net, shifts, half, extremes, mean)
    whole = functools.reduce(Extremes.merge, ranges)
    chosen = _chosen(model, shifts, halves, ranges, means, config)
    moved = []
    for _, producer, consumer in places:
        if any(chosen[consumer]):
            low, high = whole.low[consumer], whole.high[consumer]
            moved.append(Moved(producer, consumer, *channel_scale(low, high, *chosen[consumer])))
    exponents = [exponent for exponent, _ in chosen.values()]
    notes = (
        f"{sum(map(bool, exponents))} of {len(places)} places rescaled, {sum(c for _, c in chosen.values())} centred; "
        "exponents " + ", ".join(f"{a:g} x{exponents.count(a)}" for a in sorted(set(exponents))),
    )
    record = StageRecord("equalise", asdict(config), time.perf_counter() - start, notes=notes)
    return replace(apply_moves(model, moved), equalised=chosen).with_record(record)
