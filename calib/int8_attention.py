"""Attention in INT8: query, key, softmax output and value of a block round together, or none of them does.

    o = P v        P = softmax(q k^T / sqrt(d))        every row of P sums to 1, so        o = P (v - m) + m

TensorRT has one fused kernel for the whole, or none: a half rounded attention loses it. What costs accuracy is P, whose
small entries round to 0: the mass lost there counts as a value of 0. Hence the shift m per channel, which is free (-m in
the bias of v, W m in the bias of the projection): lost mass then counts as a value of m. The best m is

    m = sum l e / sum l^2        l = sum_t (P - Q(P))_t        e = (P - Q(P)) v        (least squares, per channel)

`prepare` chooses m and the scales on the float network, before activations are calibrated; `choose` decides last, when
everything else is rounded, which blocks keep them.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from calib.calibrate import MARGIN, Batches, spread_images
from calib.decibels import decibels
from calib.equalise import apply_moves
from calib.errors import UserError
from calib.hooks import input_hooks
from calib.moves import Moved
from calib.qdq import attention_factors, quantized_net
from calib.quant_model import ATTENTION_ROLES, QuantModel, StageRecord
from calib.quantizer import QParams, qparams_from_amax

HEAD_SIZES = (16, 32, 64)  # what TensorRT has INT8 attention kernels for ...
MAX_TOKENS = 512  # ... and how many tokens they take
SOFTMAX_THRESHOLDS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18)  # clipping thresholds tried for P
FIT_IMAGES, JUDGE_IMAGES = 8, 16  # per fold: an image has hundreds of tokens, and costs are per image
MODES = ("budget", "all")


@dataclass(frozen=True)
class Config:
    """Which blocks compute attention in INT8."""

    int8: str = "budget"  # budget: as many blocks as cost at most max_loss_db together; all: every block that can
    max_loss_db: float = 1.0  # of SQNR at the network's output, against attention in FP16

    def __post_init__(self) -> None:
        if self.int8 not in MODES:
            raise ValueError(f"int8 '{self.int8}' is not one of {', '.join(MODES)}")


class LostMass(NamedTuple):
    """Sums over rows of P, per head and channel: of l^2 (H, 1), l e (H, D) and e^2 (H, D)."""

    ll: Tensor
    le: Tensor
    ee: Tensor

    def shift(self) -> Tensor:
        """m (H, D); 0 where nothing is lost."""
        return torch.where(self.ll > 0, self.le / self.ll.clamp(min=torch.finfo(self.ll.dtype).tiny), 0.0)

    def error(self, shift: Tensor) -> float:
        """Squared error of o when the values are shifted by `shift` (H, D)."""
        return float((self.ee - 2 * shift * self.le + shift.square() * self.ll).sum())


def lost_mass(weights: Tensor, value: Tensor, params: QParams) -> LostMass:
    """What rounding P, `weights` (B, H, N, N), loses against `value` (B, H, N, D)."""
    lost = weights - params.fake_quantize(weights)
    mass, error = lost.sum(-1, keepdim=True), lost @ value
    return LostMass(*(term.double().sum((0, 2)) for term in (mass.square(), mass * error, error.square())))


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


@dataclass(frozen=True)
class Fit:
    """What one block needs: parameters by role, and the shift m (H, D) of its values."""

    params: dict[str, QParams]
    shift: Tensor


def fit(attention: nn.Module, packed: Sequence[Tensor]) -> Fit:
    """Scales and shift from the outputs of `qkv`, one tensor (B, N, 3 H D) per fold; the folds judge each other."""
    folds = [attention_factors(attention, part) for part in packed]
    found: list[tuple[float, QParams, Tensor]] = []
    for threshold in SOFTMAX_THRESHOLDS:
        rounding = qparams_from_amax(torch.tensor(threshold))
        sums = [
            lost_mass(torch.softmax(query @ key.transpose(-2, -1), dim=-1), value, rounding)
            for query, key, value in folds
        ]
        error = sum(part.error(sums[index - 1].shift()) for index, part in enumerate(sums))
        total = LostMass(*(torch.stack(terms).sum(0) for terms in zip(*sums, strict=True)))
        found.append((error, rounding, total.shift().float()))
    _, softmax, shift = min(found, key=lambda choice: choice[0])
    query, key, value = (torch.cat(parts) for parts in zip(*folds, strict=True))
    inputs = {"query": query, "key": key, "value": value - shift[:, None]}
    params = {role: qparams_from_amax(x.abs().max() * MARGIN) for role, x in inputs.items()}
    return Fit(params | {"softmax": softmax}, shift)


def prepare(model: QuantModel, folds: Sequence[Batches], config: Config) -> QuantModel:
    """`model` with sites for every attention that can compute in INT8, its values shifted (same float function).

    Raises UserError if the family has no attention.
    """
    start = time.perf_counter()
    names = model.family.attentions(model.net)
    if not names:
        raise UserError(f"INT8 attention was asked for, but family '{model.family.name}' has none: use another RECIPE")
    images = [spread_images(batches, FIT_IMAGES) for batches in folds]
    refused: dict[str, str] = {}
    fits: dict[str, Fit] = {}

    def look(name: str, attention: nn.Module, x: Tensor) -> None:
        if reason := obstacle(attention, x.shape[1]):
            refused[name] = reason
        else:
            packed = attention.get_submodule("qkv")(x)
            fits[name] = fit(attention, packed.split([len(part) for part in images]))

    with input_hooks(model.net, names, look), torch.inference_mode():
        model.net(torch.cat(images))
    moved = [
        Moved(f"{name}.qkv", f"{name}.proj", torch.ones(found.shift.numel()), found.shift.flatten().clone())
        for name, found in fits.items()
    ]
    sites = {f"{name}:{role}": found.params[role] for name, found in fits.items() for role in ATTENTION_ROLES}
    notes = (f"{len(fits)} of {len(names)} attentions can compute in INT8, values shifted there", *(
        f"{name}: {reason}" for name, reason in refused.items()
    ))  # fmt: skip
    record = StageRecord("attention", asdict(config), time.perf_counter() - start, notes=notes)
    return apply_moves(model, moved).with_sites(sites).with_record(record)


def without_attention(model: QuantModel, kept: Sequence[str] = ()) -> QuantModel:
    """`model` with attention in FP16 except in the modules `kept`."""
    dropped = {f"{name}:{role}" for name in model.int8_attention if name not in kept for role in ATTENTION_ROLES}
    return replace(model, sites={site: params for site, params in model.sites.items() if site not in dropped})


def choose(model: QuantModel, folds: Sequence[Batches], config: Config) -> QuantModel:
    """`model` with the attention sites that stay, by the network's output on calibration images."""
    start = time.perf_counter()
    images = torch.cat([spread_images(batches, JUDGE_IMAGES) for batches in folds])
    names = model.int8_attention
    layers_in_float = replace(model, sites={s: p for s, p in model.sites.items() if not s.endswith(":weight")})

    with torch.inference_mode():
        reference = model.float_net(images)

        def noise(candidate: QuantModel) -> float:
            return float((quantized_net(candidate)(images) - reference).square().sum())

        def db(candidate: QuantModel) -> float:
            return decibels(float(reference.square().sum()), noise(candidate))

        none, everywhere = db(without_attention(model)), db(model)
        kept, reached = names, everywhere
        if config.int8 == "budget" and everywhere < none - config.max_loss_db:
            # alone in an otherwise float network: the order is then not drowned in the noise of the other layers
            alone = {name: noise(without_attention(layers_in_float, [name])) for name in names}
            order = sorted(names, key=lambda name: alone[name])
            kept, reached = (), none
            while (found := db(without_attention(model, order[: len(kept) + 1]))) >= none - config.max_loss_db:
                kept, reached = tuple(order[: len(kept) + 1]), found
    notes = (
        f"INT8 attention in {len(kept)} of {len(names)} blocks: {reached:.1f} dB on calibration images "
        f"(in none {none:.1f} dB, in all {everywhere:.1f} dB)",
    )
    record = StageRecord("choose attention", asdict(config), time.perf_counter() - start, none, reached, notes)
    return without_attention(model, kept).with_record(record)
