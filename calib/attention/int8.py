"""Attention in INT8: query, key, softmax output and value of a block round together, or none of them does.

    o = P v        P = softmax(q k^T / sqrt(d))        every row of P sums to 1, so        o = P (v - m) + m

TensorRT has one fused kernel for the whole, or none: a half rounded attention loses it. What costs accuracy is P, whose
small entries round to 0 and whose largest are clipped: the mass lost there counts as a value of 0. Hence the shift m per
channel, which costs nothing (-m in the bias of v, W m in the bias of the projection): lost mass then counts as a value of m.

    m = sum l e / sum l^2        l = sum_t (P - Q(P))_t        e = (P - Q(P)) v        (least squares, per channel)

The error e - m l of o reaches the network's output as r^T J (e - m l), to first order, for random r
(calib/judge/first_order.py). That chooses each threshold of P, with and without the shift, m being fitted on one half of the
images. The error of o itself does not tell: in the last block, only the class token's row of it is ever read.

The stage comes last, when everything else is rounded. A block without INT8 attention stays exactly as it was.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from calib.errors import UserError
from calib.images.batches import ROTATIONS, Batches, Half, spread_images
from calib.judge.budget import Budget
from calib.judge.first_order import output_gradients
from calib.judge.held_out import LARGEST_DB, Candidate
from calib.network.qdq import attention_factors, quantize_dequantize
from calib.network.rounded_layer import rounded_layer, with_biases
from calib.quant_model import ATTENTION_ROLES, QuantModel, StageRecord
from calib.quantizer import QParams, fp16_scale, qparams_from_amax
from calib.scales.equalise import apply_moves
from calib.structure.moves import Moved, produce

HEAD_SIZES = (16, 32, 64)  # what TensorRT has INT8 attention kernels for ...
MAX_TOKENS = 512  # ... and how many tokens they take
SOFTMAX_THRESHOLDS = (1.0, 0.85, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12)  # clipping thresholds tried for P
IMAGES = 8  # per part of a half: an image has hundreds of tokens, and costs are per image
MARGIN = 1.25  # of the largest query, key and value: new images exceed it
MODES = ("budget", "all")


@dataclass(frozen=True)
class Config:
    """Which blocks compute attention in INT8."""

    int8: str = "budget"  # budget: as many blocks as cost at most max_loss_db together; all: every block that can
    max_loss_db: float = 1.0  # of SQNR at the network's output, against attention in FP16

    def __post_init__(self) -> None:
        if self.int8 not in MODES:
            raise ValueError(f"int8 '{self.int8}' is not one of {', '.join(MODES)}")
        if not self.max_loss_db <= LARGEST_DB:
            raise ValueError(f"max_loss_db {self.max_loss_db} is not a number up to {LARGEST_DB:.0f}")


class LostMass(NamedTuple):
    """What rounding P loses: sums over its rows, per head and channel, and what that does to the output for K vectors r.

    `ll` (H, 1) of l^2, `le` (H, D) of l e; `error` (K, B) of g e and `mass` (K, B, H, D) of g l, where g = J^T r.
    """

    ll: Tensor
    le: Tensor
    error: Tensor
    mass: Tensor

    def shift(self) -> Tensor:
        """Return m (H, D); 0 where nothing is lost."""
        return torch.where(self.ll > 0, self.le / self.ll.clamp(min=torch.finfo(self.ll.dtype).tiny), 0.0)

    def noise(self, shift: Tensor) -> float:
        """Return the squared error of the network's output, to first order, with values shifted by `shift` (H, D)."""
        return float((self.error - (self.mass * shift).sum((2, 3))).square().mean(0).sum())


def lost_mass(weights: Tensor, value: Tensor, gradients: Tensor, params: QParams) -> LostMass:
    """Return what rounding P, `weights` (B, H, N, N), loses with `value` (B, H, N, D); `gradients` (K, B, H, N, D) at o."""
    lost = weights - quantize_dequantize(weights, params.scale)
    mass, error = lost.sum(-1, keepdim=True), lost @ value
    least_squares = (term.sum((0, 2)).double() for term in (mass.square(), mass * error))
    down = torch.einsum("kbhnd,bhnd->kb", gradients, error), torch.einsum("kbhnd,bhn->kbhd", gradients, mass[..., 0])
    return LostMass(*least_squares, *(term.double() for term in down))


def together(parts: Sequence[LostMass]) -> LostMass:
    """Return the sums over all images of `parts`."""
    ll, le, error, mass = zip(*parts, strict=True)
    return LostMass(sum(ll), sum(le), torch.cat(error, 1), torch.cat(mass, 1))


def unmodelled(attention: nn.Module) -> str | None:
    """Return why `QuantAttention` does not compute the same as this attention, or None."""
    if getattr(attention, "gate", None) is not None or not isinstance(attention.get_submodule("norm"), nn.Identity):
        return "a gate or a norm behind it"
    return None


def why_not_int8(attention: nn.Module, tokens: int) -> str | None:
    """Return why TensorRT has no INT8 kernel for this attention, or None."""
    if attention.head_dim not in HEAD_SIZES:
        return f"head size {attention.head_dim} (INT8 kernels: {', '.join(map(str, HEAD_SIZES))})"
    if tokens > MAX_TOKENS:
        return f"{tokens} tokens (INT8 kernels: at most {MAX_TOKENS})"
    return unmodelled(attention)


class AttentionSums(NamedTuple):
    """What some images showed of an attention: what P loses at each threshold, and the ranges of the other factors."""

    lost: tuple[LostMass, ...]  # by threshold of SOFTMAX_THRESHOLDS
    query: Tensor  # largest |q|, ()
    key: Tensor
    value: Tensor  # extremes (2, H, D): lowest, highest
    output: Tensor  # extremes of o (2, H, D)


def _extremes(x: Tensor) -> Tensor:
    return torch.stack([x.amin((0, 2)), x.amax((0, 2))])


def look(attention: nn.Module, packed: Tensor, gradients: Tensor) -> AttentionSums:
    """Return the sums of `packed` (B, N, 3 H D) from `qkv`; `gradients` (K, B, N, H D) at what `proj` reads."""
    query, key, value = attention_factors(attention, packed)
    weights = torch.softmax(query @ key.transpose(-2, -1), dim=-1)
    heads = gradients.unflatten(-1, value.shape[1::2]).transpose(2, 3)
    lost = tuple(lost_mass(weights, value, heads, qparams_from_amax(torch.tensor(t))) for t in SOFTMAX_THRESHOLDS)
    return AttentionSums(lost, query.abs().max(), key.abs().max(), _extremes(value), _extremes(weights @ value))


def merged(parts: Sequence[AttentionSums]) -> AttentionSums:
    """Return the sums over all images of `parts`."""
    lost = tuple(together(each) for each in zip(*(part.lost for part in parts), strict=True))
    largest = (torch.stack([getattr(part, role) for part in parts]).amax(0) for role in ("query", "key"))
    extremes = (
        torch.stack([torch.stack([getattr(part, role)[0] for part in parts]).amin(0),
                     torch.stack([getattr(part, role)[1] for part in parts]).amax(0)])
        for role in ("value", "output")
    )  # fmt: skip
    return AttentionSums(lost, *largest, *extremes)


class Fit(NamedTuple):
    """What one attention needs: `params` by role, the `shift` m (H, D) of its values, and how much that narrows o."""

    params: dict[str, QParams]
    shift: Tensor
    narrowing: float  # |o - m| over |o|, at most


def best_threshold(sums: Sequence[Sequence[AttentionSums]], parts: Sequence[int]) -> tuple[float, int, bool]:
    """Return (squared output error, index of P's threshold, whether values are shifted) of the best choice.

    `sums[i][p]`: those over part p of half i. m comes from one half, the images it is measured on are `parts` of the other.
    """
    halves = [merged(of_half) for of_half in sums]
    found: list[tuple[float, int, bool]] = []
    for which in range(len(SOFTMAX_THRESHOLDS)):
        for shifted in (False, True):
            noise = sum(
                sums[index - 1][part].lost[which].noise(half.lost[which].shift() * shifted)
                for index, half in enumerate(halves)
                for part in parts
            )
            found.append((noise, which, shifted))
    return min(found)


def fit(sums: AttentionSums, which: int, shifted: bool) -> Fit:
    """Return the quantizers and the shift that the images of `sums` give at the threshold number `which`."""
    shift = (sums.lost[which].shift() * shifted).float()
    reach = {"query": sums.query, "key": sums.key, "value": (sums.value - shift).abs().max()}
    params = {role: qparams_from_amax(amax * MARGIN) for role, amax in reach.items()}
    params["softmax"] = qparams_from_amax(torch.tensor(SOFTMAX_THRESHOLDS[which]))
    return Fit(params, shift, float((sums.output - shift).abs().max() / sums.output.abs().max()))


def _observe(
    model: QuantModel, names: Sequence[str], batches: Batches
) -> tuple[dict[str, AttentionSums], dict[str, str]]:
    """Return (what some images showed, why TensorRT has no INT8 kernel) by attention, of the float network."""
    seen: dict[str, list[AttentionSums]] = {name: [] for name in names}
    refused: dict[str, str] = {}
    net = model.exact_net
    hooked = [*names, *(f"{name}.proj" for name in names)]
    for inputs, gradients, *_ in output_gradients(net, hooked, spread_images(batches, IMAGES)):
        with torch.inference_mode():
            for name in names:
                attention = net.get_submodule(name)
                if reason := why_not_int8(attention, inputs[name].shape[1]):
                    refused[name] = reason
                else:
                    packed = attention.get_submodule("qkv")(inputs[name])
                    seen[name].append(look(attention, packed, gradients[f"{name}.proj"]))
    return {name: merged(parts) for name, parts in seen.items() if parts}, refused


def with_attention(model: QuantModel, fits: Mapping[str, Fit]) -> QuantModel:
    """Return `model`, whose weights are rounded, with these attentions in INT8 and their values shifted."""
    if not fits:
        return model
    moved = {
        name: Moved(f"{name}.qkv", (f"{name}.proj",), torch.ones(each.shift.numel()), each.shift.flatten())
        for name, each in fits.items()
        if each.shift.any()
    }
    exact = apply_moves(replace(model, net=model.exact_net), moved.values())
    net = copy.deepcopy(model.net)
    changes = {}
    for name, one in moved.items():
        proj = f"{name}.proj"
        place = model.structure.place_of(proj)
        assert place is not None  # as for every attention of a structure
        produce(net, place, one.scale, one.shift)
        rounded = rounded_layer(net.get_submodule(proj), model.qparams(f"{proj}:weight"))
        changes[proj] = rounded.weight.flatten(0, 1) @ one.shift  # of the weight that runs
    net = with_biases(net, changes)
    quantizers = {f"{name}:{role}": each.params[role] for name, each in fits.items() for role in ATTENTION_ROLES}
    for name, each in fits.items():
        read = model.qparams(f"{name}.proj:input")
        quantizers[f"{name}.proj:input"] = replace(read, scale=fp16_scale(read.scale * each.narrowing))
    return replace(exact, net=net).with_quantizers(quantizers)


class Choice(NamedTuple):
    """What some parts of the images choose: fits by half and of all images, and the cost of each attention, by name.

    The cost is the squared error of the network's output, to first order.
    """

    by_half: tuple[dict[str, Fit], ...]
    whole: dict[str, Fit]
    cost: dict[str, float]


def chosen(sums: Mapping[str, Sequence[Sequence[AttentionSums]]], parts: Sequence[int]) -> Choice:
    """Return what `parts` of either half choose; `sums[name][i][p]`: those over part p of half i."""
    choice = Choice(({}, {}), {}, {})
    for name, of_name in sums.items():
        choice.cost[name], which, shifted = best_threshold(of_name, parts)
        halves = [merged(of_half) for of_half in of_name]
        for fits, half in zip(choice.by_half, halves, strict=True):
            fits[name] = fit(half, which, shifted)
        choice.whole[name] = fit(merged(halves), which, shifted)
    return choice


class Attentions:
    """The attentions of a network whose layers are rounded, and what each would need and cost in INT8.

    Raises UserError if the network has none.
    """

    def __init__(self, model: QuantModel, halves: Sequence[Half]) -> None:
        names = model.structure.attentions
        if not names:
            raise UserError(
                f"INT8 attention was asked for, but {model.structure.kind} has none with a packed qkv and no mask: "
                f"use another RECIPE"
            )
        self.model, self.halves = model, halves
        seen = [[_observe(model, names, part) for part in half.parts] for half in halves]
        self.refused = seen[0][0][1]
        sums = {name: [[found[name] for found, _ in of_half] for of_half in seen] for name in seen[0][0][0]}
        self.choices = [chosen(sums, [part]) for part, _ in ROTATIONS]
        self.together = chosen(sums, [part for part, _ in ROTATIONS])

    def candidate(self, by_rotation: Sequence[Sequence[str]], names: Sequence[str]) -> Candidate:
        """Return the network with attention in INT8: in `names`, in the trials of rotation r in `by_rotation[r]`."""

        def with_names(fits: Mapping[str, Fit], names: Sequence[str]) -> QuantModel:
            return with_attention(self.model, {name: fits[name] for name in names})

        trials = tuple(
            tuple(with_names(fits, of_rotation) for fits in choice.by_half)
            for choice, of_rotation in zip(self.choices, by_rotation, strict=True)
        )
        title = f"INT8 attention in {len(names)} of {len(self.together.whole)} blocks"
        return Candidate(title, trials, with_names(self.together.whole, names))


def int8_attention(model: QuantModel, halves: Sequence[Half], config: Config) -> QuantModel:
    """Return `model`, all of whose layers are rounded, with attention in INT8 where the budget allows it.

    Where the images that judge show a loss over the budget, none stays, and the network is what it was. Raises UserError if
    the network has no attention.
    """
    start = time.perf_counter()
    found = Attentions(model, halves)
    budget = Budget(model, halves, found.candidate, config.max_loss_db)
    rotations = range(len(ROTATIONS))
    names = list(found.together.whole)
    by_rotation = [names] * len(ROTATIONS)
    if config.int8 == "budget":

        def affordable(cost: Mapping[str, float], rotations: Sequence[int]) -> list[str]:
            return budget.affordable(sorted(cost, key=lambda name: cost[name]), cost, rotations)

        names = affordable(found.together.cost, rotations)
        by_rotation = [affordable(found.choices[rotation].cost, [rotation]) for rotation in rotations]
    candidate, errors, within = budget.judged(by_rotation, names)
    kept = config.int8 == "all" or within
    note = (
        f"{candidate.name}: output SQNR {errors.db(1):.2f} dB against {errors.db(0):.2f} dB in FP16, on held-out images"
    )
    notes = (
        note if kept else f"dropped, no INT8 attention: {note}",
        *(f"{name}: {reason}" for name, reason in found.refused.items()),
    )
    options, seconds = asdict(config), time.perf_counter() - start
    record = StageRecord("attention", options, seconds, errors.db(0), errors.db(1 if kept else 0), notes)
    return (candidate.whole if kept else model).with_record(record)
