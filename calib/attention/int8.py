"""Attention in INT8: query, key, softmax output and value of a block round together, or none of them does.

    o = P v        P = softmax(q k^T / sqrt(d))        every row of P sums to 1, so        o = P (v - m) + m

TensorRT has one fused kernel for the whole, or none: a half rounded attention loses it. What costs accuracy is P, whose
small entries round to 0 and whose largest are clipped: the mass lost there counts as a value of 0. Hence the shift m per
channel, which is free (-m in the bias of v, W m in the bias of the projection): lost mass then counts as a value of m.

    m = sum l e / sum l^2        l = sum_t (P - Q(P))_t        e = (P - Q(P)) v        (least squares, per channel)

The error e - m l of o reaches the network's output as r^T J (e - m l), to first order, for random r
(calib/judge/first_order.py): that judges each threshold of P, with and without the shift, m being fitted on one half
of the photographs and judged on the other. The error of o itself is a poor judge: in the last block, only the class
token's row of it is ever read.

`prepare` decides this on the float network, before activations are calibrated; `choose` decides last, when everything
else is rounded, which blocks keep it, and takes the shifts of the others back: a shift can widen what the projection reads.
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from calib.errors import UserError
from calib.images.batches import Batches, spread_images
from calib.judge.decibels import decibels
from calib.judge.first_order import output_gradients
from calib.network.qdq import attention_factors, quantize_dequantize, quantized_net
from calib.quant_model import ATTENTION_ROLES, QuantModel, StageRecord
from calib.quantizer import QParams, fp16_scale, qparams_from_amax
from calib.scales.equalise import apply_moves
from calib.structure.moves import Moved

HEAD_SIZES = (16, 32, 64)  # what TensorRT has INT8 attention kernels for ...
MAX_TOKENS = 512  # ... and how many tokens they take
SOFTMAX_THRESHOLDS = (1.0, 0.85, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12)  # clipping thresholds tried for P
IMAGES = 16  # per fold: an image has hundreds of tokens, and costs are per image
MARGIN = 1.25  # of the largest query, key and value: new photographs exceed it
MODES = ("budget", "all")
STAGE = "attention"
NOISE, RANGE = "noise", "range"  # in the record's details, by attention


@dataclass(frozen=True)
class Config:
    """Which blocks compute attention in INT8."""

    int8: str = "budget"  # budget: as many blocks as cost at most max_loss_db together; all: every block that can
    max_loss_db: float = 1.0  # of SQNR at the network's output, against attention in FP16

    def __post_init__(self) -> None:
        if self.int8 not in MODES:
            raise ValueError(f"int8 '{self.int8}' is not one of {', '.join(MODES)}")


class LostMass(NamedTuple):
    """What rounding P loses: sums over its rows, per head and channel, and what that does to the output for K vectors r.

    `ll` (H, 1) of l^2, `le` (H, D) of l e; `error` (K, B) of g e and `mass` (K, B, H, D) of g l, where g = J^T r.
    """

    ll: Tensor
    le: Tensor
    error: Tensor
    mass: Tensor

    def shift(self) -> Tensor:
        """m (H, D); 0 where nothing is lost."""
        return torch.where(self.ll > 0, self.le / self.ll.clamp(min=torch.finfo(self.ll.dtype).tiny), 0.0)

    def noise(self, shift: Tensor) -> float:
        """Squared error of the network's output, to first order, when the values are shifted by `shift` (H, D)."""
        return float((self.error - (self.mass * shift).sum((2, 3))).square().mean(0).sum())


def lost_mass(weights: Tensor, value: Tensor, gradients: Tensor, params: QParams) -> LostMass:
    """What rounding P, `weights` (B, H, N, N), loses against `value` (B, H, N, D); `gradients` g (K, B, H, N, D) at o."""
    lost = weights - quantize_dequantize(weights, params.scale)
    mass, error = lost.sum(-1, keepdim=True), lost @ value
    least_squares = (term.sum((0, 2)).double() for term in (mass.square(), mass * error))
    down = torch.einsum("kbhnd,bhnd->kb", gradients, error), torch.einsum("kbhnd,bhn->kbhd", gradients, mass[..., 0])
    return LostMass(*least_squares, *(term.double() for term in down))


def together(parts: Sequence[LostMass]) -> LostMass:
    """Of all images of `parts`."""
    ll, le, error, mass = zip(*parts, strict=True)
    return LostMass(sum(ll), sum(le), torch.cat(error, 1), torch.cat(mass, 1))


def unmodelled(attention: nn.Module) -> str | None:
    """Why `QuantAttention` does not compute the same as this attention, or None."""
    if getattr(attention, "gate", None) is not None or not isinstance(attention.get_submodule("norm"), nn.Identity):
        return "a gate or a norm behind it"
    return None


def obstacle(attention: nn.Module, tokens: int) -> str | None:
    """Why TensorRT has no INT8 kernel for this attention, or None."""
    if attention.head_dim not in HEAD_SIZES:
        return f"head size {attention.head_dim} (INT8 kernels: {', '.join(map(str, HEAD_SIZES))})"
    if tokens > MAX_TOKENS:
        return f"{tokens} tokens (INT8 kernels: at most {MAX_TOKENS})"
    return unmodelled(attention)


class Seen(NamedTuple):
    """What one fold showed of an attention: what P loses at each threshold, and the ranges of the other factors."""

    lost: tuple[LostMass, ...]  # by threshold of SOFTMAX_THRESHOLDS
    query: Tensor  # largest |q|, ()
    key: Tensor
    value: Tensor  # extremes (2, H, D): lowest, highest
    output: Tensor  # extremes of o (2, H, D)


def _extremes(x: Tensor) -> Tensor:
    return torch.stack([x.amin((0, 2)), x.amax((0, 2))])


def look(attention: nn.Module, packed: Tensor, gradients: Tensor) -> Seen:
    """`packed` (B, N, 3 H D) from `qkv`; `gradients` (K, B, N, H D) at what `proj` reads."""
    query, key, value = attention_factors(attention, packed)
    weights = torch.softmax(query @ key.transpose(-2, -1), dim=-1)
    heads = gradients.unflatten(-1, value.shape[1::2]).transpose(2, 3)
    lost = tuple(lost_mass(weights, value, heads, qparams_from_amax(torch.tensor(t))) for t in SOFTMAX_THRESHOLDS)
    return Seen(lost, query.abs().max(), key.abs().max(), _extremes(value), _extremes(weights @ value))


def merged(parts: Sequence[Seen]) -> Seen:
    """All of `parts` as one."""
    lost = tuple(together(each) for each in zip(*(part.lost for part in parts), strict=True))
    largest = (torch.stack([getattr(part, role) for part in parts]).amax(0) for role in ("query", "key"))
    ends = (
        torch.stack([torch.stack([getattr(part, role)[0] for part in parts]).amin(0),
                     torch.stack([getattr(part, role)[1] for part in parts]).amax(0)])
        for role in ("value", "output")
    )  # fmt: skip
    return Seen(lost, *largest, *ends)


class Fit(NamedTuple):
    """What one block needs, and what that costs."""

    params: dict[str, QParams]  # by role
    shift: Tensor  # m (H, D) of its values
    noise: float  # at the network's output, across folds
    range: float  # how much wider o reaches than o - m


def fit(folds: Sequence[Seen]) -> Fit:
    """Threshold of P and shift by the network's output: m from one fold, the images it is judged on from the next."""
    choices: list[tuple[float, int, bool]] = []
    for which in range(len(SOFTMAX_THRESHOLDS)):
        lost = [fold.lost[which] for fold in folds]
        for shifted in (False, True):
            noise = sum(part.noise(lost[index - 1].shift() * shifted) for index, part in enumerate(lost))
            choices.append((noise, which, shifted))
    noise, which, shifted = min(choices)
    whole = merged(folds)
    shift = (whole.lost[which].shift() * shifted).float()
    reach = {"query": whole.query, "key": whole.key, "value": (whole.value - shift).abs().max()}
    params = {role: qparams_from_amax(amax * MARGIN) for role, amax in reach.items()}
    params["softmax"] = qparams_from_amax(torch.tensor(SOFTMAX_THRESHOLDS[which]))
    return Fit(params, shift, noise, float(whole.output.abs().max() / (whole.output - shift).abs().max()))


def _observe(model: QuantModel, names: Sequence[str], batches: Batches) -> tuple[dict[str, Seen], dict[str, str]]:
    """(what one fold showed, why TensorRT could not) by attention."""
    seen: dict[str, list[Seen]] = {name: [] for name in names}
    refused: dict[str, str] = {}
    hooked = [*names, *(f"{name}.proj" for name in names)]
    for inputs, gradients, _ in output_gradients(model.net, hooked, spread_images(batches, IMAGES)):
        with torch.inference_mode():
            for name in names:
                attention = model.net.get_submodule(name)
                if reason := obstacle(attention, inputs[name].shape[1]):
                    refused[name] = reason
                else:
                    packed = attention.get_submodule("qkv")(inputs[name])
                    seen[name].append(look(attention, packed, gradients[f"{name}.proj"]))
    return {name: merged(parts) for name, parts in seen.items() if parts}, refused


def _with_shifts(model: QuantModel, shifts: dict[str, Tensor]) -> QuantModel:
    """`model` with the values of these attentions shifted further by m (H D,); the function stays."""
    moved = [Moved(f"{name}.qkv", f"{name}.proj", torch.ones(len(m)), m) for name, m in shifts.items()]
    exact = apply_moves(replace(model, net=model.exact_net), moved)
    net = exact.net if model.net is model.exact_net else apply_moves(model, moved).net
    return replace(exact, net=net)


def prepare(model: QuantModel, folds: Sequence[Batches], config: Config) -> QuantModel:
    """`model` with quantizers for every attention that can compute in INT8, its values shifted (same float function).

    Raises UserError if the family has no attention.
    """
    start = time.perf_counter()
    names = model.family.attentions(model.net)
    if not names:
        raise UserError(f"INT8 attention was asked for, but family '{model.family.name}' has none: use another RECIPE")
    found = [_observe(model, names, batches) for batches in folds]
    seen, refused = [each for each, _ in found], found[0][1]
    fits = {name: fit([fold[name] for fold in seen]) for name in seen[0]}
    shifts = {name: each.shift.flatten() for name, each in fits.items() if each.shift.any()}
    quantizers = {f"{name}:{role}": each.params[role] for name, each in fits.items() for role in ATTENTION_ROLES}
    notes = (
        f"{len(fits)} of {len(names)} attentions can compute in INT8, values shifted in {len(shifts)}",
        *(f"{name}: {reason}" for name, reason in refused.items()),
    )
    details = {
        NOISE: {name: each.noise for name, each in fits.items()},
        RANGE: {name: each.range for name, each in fits.items()},
    }
    record = StageRecord(STAGE, asdict(config), time.perf_counter() - start, notes=notes, details=details)
    return _with_shifts(model, shifts).with_quantizers(quantizers).with_record(record)


def _prepared(model: QuantModel) -> dict[str, dict[str, float]]:
    (record,) = (record for record in model.history if record.stage == STAGE)
    return record.details


def without_attention(model: QuantModel, kept: Sequence[str] = ()) -> QuantModel:
    """`model` with attention in FP16 except in the modules `kept`: no quantizers there, and values as they were."""
    dropped = [name for name in model.int8_attention if name not in kept]
    gone = {f"{name}:{role}" for name in dropped for role in ATTENTION_ROLES}
    quantizers = {quantizer: params for quantizer, params in model.quantizers.items() if quantizer not in gone}
    shifts = {}
    for name in dropped:
        # equalise's moves of these channels have no shift
        m = sum((each.shift for each in model.moved if each.consumer == f"{name}.proj"), torch.zeros(()))
        if m.any():
            shifts[name] = -m
            read = model.qparams(f"{name}.proj:input")
            quantizers[f"{name}.proj:input"] = replace(
                read, scale=fp16_scale(read.scale * _prepared(model)[RANGE][name])
            )
    return _with_shifts(replace(model, quantizers=quantizers), shifts)


def choose(model: QuantModel, folds: Sequence[Batches], config: Config) -> QuantModel:
    """`model` with the attention quantizers that stay: the cheapest ones whose costs together are within the budget.

    The costs are those that `prepare` measured across photographs, and they add up to first order; then the network that
    results is measured, and gives back the dearest as long as it is not within the budget.
    """
    start = time.perf_counter()
    images = torch.cat([spread_images(batches, IMAGES) for batches in folds])
    cost = _prepared(model)[NOISE]
    order = sorted(model.int8_attention, key=lambda name: cost[name])

    with torch.inference_mode():
        reference = model.float_net(images)
        signal = float(reference.square().sum())

        def noise(kept: Sequence[str]) -> float:
            return float((quantized_net(without_attention(model, kept))(images) - reference).square().sum())

        none = noise(())
        limit = none * 10 ** (config.max_loss_db / 10)
        kept = order
        if config.int8 == "budget":
            totals = itertools.accumulate((cost[name] for name in order), initial=none)
            kept = [name for name, total in zip(order, list(totals)[1:], strict=True) if total <= limit]
        reached = noise(kept)
        while config.int8 == "budget" and kept and reached > limit:
            kept = kept[:-1]
            reached = noise(kept)
    foretold = decibels(signal, none + sum(cost[name] for name in kept))
    before, after = decibels(signal, none), decibels(signal, reached)
    notes = (
        f"INT8 attention in {len(kept)} of {len(order)} blocks: {after:.1f} dB on calibration images, "
        f"{foretold:.1f} dB across photographs (in none {before:.1f} dB)",
    )
    record = StageRecord("choose attention", asdict(config), time.perf_counter() - start, before, after, notes)
    return without_attention(model, kept).with_record(record)
