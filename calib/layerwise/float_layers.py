"""Layers that go back to FP16 because their rounding costs most: one or two of a CNN can hold half of its output error.

To first order in what all layers lose (calib/judge/choice.py) the gain of any set of them is known from one run. Layers are
taken one by one, the one that gains most first, while each gains `min_gain_db` and together they take no more than
`max_share` of the work. How many stay is a choice like any other: the judge makes it on images that chose no layer.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from calib.hooks import output_hooks
from calib.images.batches import ROTATIONS, Half, spread_images
from calib.judge.choice import BATCH, output_terms
from calib.judge.decibels import decibels
from calib.judge.held_out import Candidate, Offer
from calib.network.qdq import quantized_net
from calib.quant_model import QuantModel
from calib.structure.in_front import replace_layer

IMAGES = 6  # per part


@dataclass(frozen=True)
class Config:
    """What may stay in FP16, and what each layer has to gain for it."""

    max_share: float = 0.03  # of the multiplications of all quantized layers
    min_gain_db: float = 0.5  # of the network's output SQNR, per layer

    def __post_init__(self) -> None:
        if not 0 <= self.max_share <= 1:
            raise ValueError(f"max_share is {self.max_share}: expected 0 to 1")
        if not 0 < self.min_gain_db < float("inf"):
            raise ValueError(f"min_gain_db is {self.min_gain_db}: expected a positive number")


def shares(net: nn.Module, layers: Sequence[str], example: Tensor) -> dict[str, float]:
    """Return the share of the multiplications of `layers` that each of them does for `example` (1, 3, H, W)."""
    work = dict.fromkeys(layers, 0)

    def count(name: str, y: Tensor) -> None:
        work[name] += y.numel() * net.get_submodule(name).get_parameter("weight")[0].numel()

    with output_hooks(net, layers, count), torch.no_grad():
        net(example)
    return {name: number / sum(work.values()) for name, number in work.items()}


def in_order(terms: Tensor, share: Sequence[float], config: Config) -> list[tuple[int, float]]:
    """Return the layers worth their work, the one that gains most first, with the gain (dB) of each behind those before.

    `terms` (S, 1 + L) as of `output_terms`; `share` of each of the L layers.
    """
    missing, gains = terms[:, 0], terms[:, 1:]
    found: list[tuple[int, float]] = []
    left, now = config.max_share, float(missing.square().sum())
    while True:
        errors = (missing[:, None] + gains).square().sum(0).tolist()
        taken = {index for index, _ in found}
        fitting = [index for index in range(len(share)) if index not in taken and share[index] <= left]
        best = min(fitting, key=lambda index: errors[index], default=None)
        if best is None or not (gain := decibels(now, errors[best])) >= config.min_gain_db:
            return found
        found.append((best, gain))
        missing, now, left = missing + gains[:, best], errors[best], left - share[best]


def costs_db(terms: Tensor) -> list[float]:
    """Return what INT8 costs the output (dB SQNR) at each of L layers: what that layer alone in float would gain.

    `terms` (S, 1 + L) as of `output_terms`.
    """
    missing, gains = terms[:, :1], terms[:, 1:]
    now = float(missing.square().sum())
    return [decibels(now, left) for left in (missing + gains).square().sum(0).tolist()]


def in_float(model: QuantModel, reasons: Mapping[str, str]) -> QuantModel:
    """Return `model` with the layers of `reasons` as they are in the exact network, unrounded."""
    net = copy.deepcopy(model.net)
    for name in reasons:
        replace_layer(net, name, copy.deepcopy(model.exact_net.get_submodule(name)))
    quantizers = {key: grid for key, grid in model.quantizers.items() if key.rpartition(":")[0] not in reasons}
    return replace(model, net=net, quantizers=quantizers, kept_float={**model.kept_float, **reasons})


def float_terms(model: QuantModel, layers: Sequence[str], images: Tensor, generator: torch.Generator) -> Tensor:
    """Return `output_terms` (B K, 1 + L) of having each of the L `layers` of `model` in float; `images` (B, 3, H, W)."""
    net = quantized_net(model)

    def change(name: str, x: Tensor, y: Tensor) -> Tensor:
        return model.exact_net.get_submodule(name)(x) - y

    return torch.cat(
        [output_terms(net, model.float_net, layers, batch, change, generator) for batch in images.split(BATCH)]
    )


def candidates(model: QuantModel, halves: Sequence[Half], config: Config) -> Offer:
    """Offer `model` with one layer in FP16, with two, and so on, as far as layers are worth it."""
    example = next(iter(halves[0]))[:1]
    share = shares(model.net, model.quantized_layers, example)
    inside = tuple(f"{name}." for name in model.int8_attention)
    layers = [name for name, own in share.items() if own <= config.max_share and not name.startswith(inside)]
    if not layers:
        return Offer([], (f"no layer does less than {config.max_share:.0%} of the work",))
    terms = []
    for part, _ in ROTATIONS:
        generator = torch.Generator().manual_seed(0)
        images = [spread_images(half.parts[part], IMAGES) for half in halves]
        terms.append(torch.cat([float_terms(model, layers, each, generator) for each in images]))
    works = [share[name] for name in layers]
    by_rotation = [in_order(of_rotation, works, config) for of_rotation in terms]
    together = torch.cat(terms)
    found = in_order(together, works, config)
    costs = {name: cost for name, cost in zip(layers, costs_db(together), strict=True) if math.isfinite(cost)}

    def kept(order: Sequence[tuple[int, float]], count: int) -> QuantModel:
        return in_float(
            model,
            {layers[index]: f"INT8 would cost about {gain:.1f} dB of the output" for index, gain in order[:count]},
        )

    # rotations that choose alike share a network, which is judged once
    by_layers: dict[frozenset[int], QuantModel] = {}

    def shared(order: Sequence[tuple[int, float]], count: int) -> QuantModel:
        which = frozenset(index for index, _ in order[:count])
        if which not in by_layers:
            by_layers[which] = kept(order, count)
        return by_layers[which]

    offered = []
    for count in range(1, len(found) + 1):
        whole = shared(found, count)
        trials = tuple((shared(order, count),) * len(halves) for order in by_rotation)
        names = ", ".join(layers[index] for index, _ in found[:count])
        offered.append(Candidate(f"in FP16: {names}", trials, whole))
    works_of_found = sum(works[index] for index, _ in found)
    notes = (f"{len(found)} of {len(layers)} small layers would be worth FP16, with {works_of_found:.2%} of the work",)
    return Offer(offered, notes, {"cost_db": costs})
