"""Layers that go back to FP16 until a limit on accuracy is kept: those that gain most for their work first.

To first order in what all layers lose (calib/judge/choice.py) one run tells what every layer would gain. The order comes
from one part of either half of the calibration images, how many go back from the other part: as few as keep the limit
there. At most `MOST` of the work goes back, as a network with more in FP16 is hardly an INT8 network. Whether the limit is
kept in the end is seen on evaluation images, which chose nothing.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from calib.errors import TooFewError
from calib.images.batches import Half, spread_images, spread_with_sources
from calib.judge.decibels import decibels
from calib.layerwise.float_layers import float_terms, in_float, shares
from calib.network.qdq import quantized_net
from calib.outputs import named_outputs, separate_outputs
from calib.quant_model import QuantModel, StageRecord

MOST = 0.5  # of the multiplications of all quantized layers
ORDER_IMAGES = 6  # per half
COUNT_IMAGES = 64  # per half, or fewer where outputs are large
FEWEST_IMAGES, MOST_VALUES = 8, 1 << 25  # per half; of all outputs together
BATCH = 16

Outputs = dict[str, Tensor]  # (N, ...) by name
# (outputs of the float network, outputs, number of the source image of each sample) -> whether the limit is kept.
# Raises TooFewError.
Kept = Callable[[Outputs, Outputs, Sequence[int]], bool]


@dataclass(frozen=True)
class Config:
    """The limit, in words: it decides what is kept of an earlier run."""

    limit: str


def by_gain_per_work(terms: Tensor, share: Sequence[float], most: float = MOST) -> list[int]:
    """Return the layers in the order of what each gains for its share of the work, behind those before it.

    `terms` (S, 1 + L) as of `output_terms`; `share` of each of the L layers, of which `most` are taken together.
    """
    missing, gains = terms[:, 0], terms[:, 1:]
    found: list[int] = []
    left = most
    while True:
        now = float(missing.square().sum())
        errors = (missing[:, None] + gains).square().sum(0).tolist()
        fitting = [index for index in range(len(share)) if index not in found and share[index] <= left]
        best = max(fitting, key=lambda index: (now - errors[index]) / max(share[index], 1e-12), default=None)
        if best is None or not errors[best] < now:
            return found
        found.append(best)
        missing, left = missing + gains[:, best], left - share[best]


def fewest(count: int, holds: Callable[[int], bool]) -> int | None:
    """Return the least of 0 .. `count` for which `holds`, by bisection as more can only help; None if `count` does not."""
    if holds(0):
        return 0
    if not holds(count):
        return None
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


@torch.inference_mode()
def _outputs(net: nn.Module, images: Tensor) -> Outputs:
    with separate_outputs(net):
        every = [named_outputs(net(batch)) for batch in images.split(BATCH)]
    return {name: torch.cat([one[name] for one in every]) for name in every[0]}


def _sqnr_db(exact: Outputs, found: Outputs) -> float:
    """SQNR of all outputs, which count alike."""
    powers = [(float(value.double().square().sum()), float((found[name] - value).double().square().sum()))
              for name, value in exact.items()]  # fmt: skip
    return decibels(float(len(powers)), sum(noise / (signal or 1.0) for signal, noise in powers))


def fall_back(model: QuantModel, halves: Sequence[Half], config: Config, kept: Kept) -> QuantModel:
    """Return `model` with as few layers in FP16 as keep a limit on calibration images, or with `MOST` of the work."""
    start = time.perf_counter()
    example = next(iter(halves[0]))[:1]
    share = shares(model.net, model.quantized_layers, example)
    inside = tuple(f"{name}." for name in model.int8_attention)
    layers = [name for name in share if not name.startswith(inside)]
    values = sum(each.numel() for each in _outputs(model.float_net, example).values())
    few = max(FEWEST_IMAGES, min(COUNT_IMAGES, MOST_VALUES // values))
    taken_of = [spread_with_sources(half.parts[1], few) for half in halves]
    images = torch.cat([found for found, _ in taken_of])
    sources = [len(halves) * number + half for half, (_, numbers) in enumerate(taken_of) for number in numbers]
    exact = _outputs(model.float_net, images)
    order: list[int] = []
    results: dict[int, float] = {}

    def network(count: int) -> QuantModel:
        return in_float(model, {layers[index]: f"back in FP16 to keep {config.limit}" for index in order[:count]})

    @functools.cache
    def holds(count: int) -> bool:
        found = _outputs(quantized_net(network(count)), images)
        results[count] = _sqnr_db(exact, found)
        return kept(exact, found, sources)

    count: int | None = 0
    try:
        kept_as_it_is = holds(0)
    except TooFewError as few_images:
        note = f"{config.limit}: {few_images}; no layer goes back to FP16 for it, and evaluation images decide"
        seconds = time.perf_counter() - start
        return model.with_record(StageRecord("fall_back", asdict(config), seconds, results[0], results[0], (note,)))
    if not kept_as_it_is:
        generator = torch.Generator().manual_seed(0)
        choosing = [spread_images(half.parts[0], ORDER_IMAGES) for half in halves]
        terms = torch.cat([float_terms(model, layers, each, generator) for each in choosing])
        order = by_gain_per_work(terms, [share[name] for name in layers])
        count = fewest(len(order), holds)
    taken = len(order) if count is None else count
    work = sum(share[layers[index]] for index in order[:taken])
    held = "kept" if count is not None else "not kept on calibration images, even"
    after = results[taken]
    rest = "" if count is not None or taken == len(layers) else "; no other fits or gains"
    note = (
        f"{config.limit}: {held} with {taken} of {len(layers)} layers back in FP16, {work:.1%} of the multiplications "
        f"({after:.1f} dB on {len(images)} calibration images{rest})"
    )
    record = StageRecord("fall_back", asdict(config), time.perf_counter() - start, results[0], after, (note,))
    return network(taken).with_record(record)
