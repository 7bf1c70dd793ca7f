"""Channel equalisation: give every channel of a layer's input a fair share of the one scale it is rounded with.

TensorRT rounds activations with one scale per tensor, so a channel with a small range next to one with a large range keeps
few levels. For every `Move` of the family (calib/moves.py) the range h_c of channel c becomes

    r_c = (h_c / mean h)^a         x' = (x - m) / r         (mean: geometric, so that nothing grows as a whole)

a = 1 is RepQ-ViT's scale reparametrisation in its symmetric form (eq. 8-10 with z = 0), a = 0.5 SmoothQuant's; in between,
difficulty is shared between x and the weight. The exponent, and whether to centre (m), are chosen per layer by the error of
the layer's output when input and weight are rounded, across photographs: ranges from one half of the calibration set, rows
from the other. Within one half a = 1 always looks good, because no row exceeds its own channel's range; on new
photographs the channels that fire rarely exceed theirs several times over.

`rule = "repq"` is RepQ-ViT itself (calib/repq.py), for comparison: LayerNorms alone, asymmetric, nothing is judged. The
search rounds symmetrically even where inputs get zero points later: centring does most of their work.
"""

import copy
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from calib.batches import Batches, spread_images
from calib.channel_scale import channel_scale
from calib.errors import UserError
from calib.hooks import input_hooks
from calib.layer_rows import Samples, channels_of_inputs, output_errors, sampled_inputs, weight_matrix
from calib.moves import Move, Moved, Norm
from calib.precision import INT8, UNROUNDED, LayerBits
from calib.quant_model import QuantModel, StageRecord
from calib.repq import Reparametrised, channel_ranges, reparametrised

EQUALISED = "equalised"  # in the record's details: [exponent, centred] by layer
RULES = ("search", "repq")
REPQ_IMAGES = 32  # the paper's one batch
THRESHOLDS = (1.2, 1.0, 0.8)  # clipping thresholds tried, of the input's range; the final one is calibrate's business


@dataclass(frozen=True)
class Config:
    """Which exponents are tried; `exponents = [0.0]` and `shift = false` switch the stage off."""

    exponents: tuple[float, ...] = (0.0, 0.3, 0.5, 0.7, 0.9)
    shift: bool = True  # try centring each channel where a shift can move
    rule: str = "search"  # search | repq, which has no further options and needs [precision] zero_points

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule '{self.rule}' is not one of {', '.join(RULES)}")


def rounding_error(rows: Tensor, weight: Tensor, amax: float, bits: LayerBits = INT8) -> float:
    """Least squared output error of rounding `rows` (T, G, K) and `weight` (G, N, K), over a few thresholds of `amax`."""
    return min(output_errors(rows, weight, [amax * threshold for threshold in THRESHOLDS], bits))


def _best(model: QuantModel, name: str, folds: Sequence[Samples], config: Config, shifts: bool) -> tuple[float, bool]:
    """(exponent, centred) with the least error across folds; ties go to the first, which changes least."""
    layer, bits = model.net.get_submodule(name), model.bits(name)
    columns, weight = channels_of_inputs(layer), weight_matrix(layer)
    centres = (False, True) if shifts and config.shift else (False,)

    def error(candidate: tuple[float, bool]) -> float:
        total = 0.0
        for index, fit in enumerate(folds):
            scale, shift = channel_scale(fit.low[name], fit.high[name], *candidate)
            reach = torch.maximum((fit.high[name] - shift) / scale, (shift - fit.low[name]) / scale)
            rows = (folds[index - 1].of(name) - shift[columns]) / scale[columns]
            total += rounding_error(rows, weight * scale[columns][:, None], float(reach.max()), bits)
        return total

    return min(((a, centred) for centred in centres for a in config.exponents), key=error)


def _consume(layer: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """Make `layer` read (x - shift) / scale instead of x (edits it)."""
    weight = layer.get_parameter("weight").data
    if shift.any():
        moved = weight @ shift
        bias = getattr(layer, "bias", None)
        layer.bias = nn.Parameter(moved if bias is None else bias.data + moved, requires_grad=False)
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    factor = scale.reshape(groups, 1, -1)
    shape = weight.shape
    weight.copy_((weight.reshape(groups, shape[0] // groups, shape[1], -1) * factor[..., None]).reshape(shape))


def placed_moves(model: QuantModel) -> Iterator[tuple[Move, str, str]]:
    """(move, producer, consumer) with full names, for every place of `model.net` where a move of the family applies."""
    for block, module in model.net.named_modules():
        for move in model.family.moves:
            if type(module).__name__ == move.block and move.applies(module):
                prefix = f"{block}." if block else ""
                yield move, prefix + move.producer, prefix + move.consumer


def sample_inputs(net: nn.Module, layers: Iterable[str], batches: Batches) -> Samples:
    """One pass of `net` over `batches`: extremes and rows of the inputs of `layers`."""
    with sampled_inputs(net, layers, len(batches)) as samples, torch.inference_mode():
        for batch in batches:
            net(batch)
    return samples


def apply_moves(model: QuantModel, moved: Iterable[Moved]) -> QuantModel:
    """`model` with these scales and shifts moved, each at a place where a move of the family applies."""
    net = copy.deepcopy(model.net)
    places = {(producer, consumer): move for move, producer, consumer in placed_moves(model)}
    moved = tuple(moved)
    for each in moved:
        places[each.producer, each.consumer].produce(net, each.producer, each.scale, each.shift)
        _consume(net.get_submodule(each.consumer), each.scale, each.shift)
    return replace(model, net=net, exact_net=net, moved=(*model.moved, *moved))


def _repq(model: QuantModel, folds: Sequence[Batches], config: Config) -> QuantModel:
    """`model` with RepQ-ViT's channel scales and shifts moved, and `:input` sites for the layers that read them."""
    if not model.precision.zero_points or model.precision.inputs == UNROUNDED:
        raise UserError("[equalise] rule 'repq' is for inputs that round with zero points: set them in [precision]")
    start = time.perf_counter()
    places = {consumer: producer for move, producer, consumer in placed_moves(model) if isinstance(move, Norm)}
    images = torch.cat([spread_images(batches, math.ceil(REPQ_IMAGES / len(folds))) for batches in folds])
    found: dict[str, Reparametrised] = {}

    def look(name: str, _layer: nn.Module, x: Tensor) -> None:
        bits = model.bits(name).input
        found[name] = reparametrised(*channel_ranges(x.flatten(0, -2), bits), bits)

    with input_hooks(model.net, places, look), torch.no_grad():
        model.net(images)
    moved = [Moved(places[name], name, each.scale, each.shift) for name, each in found.items()]
    notes = (f"{len(moved)} LayerNorms reparametrised as in RepQ-ViT, on {len(images)} images",)
    record = StageRecord("equalise", asdict(config), time.perf_counter() - start, notes=notes)
    sites = {f"{name}:input": each.grid for name, each in found.items()}
    return apply_moves(model, moved).with_sites(sites).with_record(record)


def equalise(model: QuantModel, folds: Sequence[Batches], config: Config) -> QuantModel:
    """`model` with channel scales (and shifts) moved; its float function is unchanged up to float rounding.

    `folds` are parts of the calibration set without a common photograph.
    """
    if config.rule == "repq":
        return _repq(model, folds, config)
    start = time.perf_counter()
    places = list(placed_moves(model))
    samples = [sample_inputs(model.net, {consumer for *_, consumer in places}, batches) for batches in folds]
    chosen, moved = [], []
    for move, producer, consumer in places:
        exponent, centred = _best(model, consumer, samples, config, move.shifts)
        if exponent or centred:
            low = torch.stack([fold.low[consumer] for fold in samples]).amin(0)
            high = torch.stack([fold.high[consumer] for fold in samples]).amax(0)
            moved.append(Moved(producer, consumer, *channel_scale(low, high, exponent, centred)))
        chosen.append((exponent, centred))
    exponents = [exponent for exponent, _ in chosen]
    notes = (
        f"{sum(map(bool, exponents))} of {len(places)} places rescaled, {sum(c for _, c in chosen)} centred; exponents "
        + ", ".join(f"{a:g} x{exponents.count(a)}" for a in sorted(set(exponents))),
    )
    details = {EQUALISED: {consumer: how for (*_, consumer), how in zip(places, chosen, strict=True)}}
    record = StageRecord("equalise", asdict(config), time.perf_counter() - start, notes=notes, details=details)
    return apply_moves(model, moved).with_record(record)
