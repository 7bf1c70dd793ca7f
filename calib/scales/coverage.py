"""Calibration coverage: are the calibration images enough? Two figures that need no labels.

Spread: had there been only one half of the source images, or only the other, how different would the scales be? A threshold
that is r times too large makes the step, hence the rounding noise, r times too large: 20 log10(r) dB. Where the halves
differ by r, the whole set is expected to be off by sqrt(r). MobileNet-v2: 1.05-1.14 with 128 down to 2 images.

Outside: how much of what a layer reads on images it was *not* calibrated on is clipped? A rule that clips calibration data
clips at most 0.1 % of it (calibrate's lowest percentile), so several times that on other images means that they are
different. MobileNet-v2's worst layer: below 0.1 % on held-out images, 1 % when their contrast is doubled.

Query, key and value of an INT8 attention count as layers; its softmax output does not: it is at most 1 everywhere, and
clipped on purpose.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calib.hooks import input_hooks
from calib.network.qdq import attention_factors
from calib.quant_model import QuantModel
from calib.quantizer import QMAX

MAX_SPREAD = 1.25  # between halves, in the middle of all layers: 1 dB of rounding noise is down to luck
MAX_OUTSIDE = 0.005  # of the elements a layer reads
SHOWN = 3  # layers named in the report
FACTORS = ("query", "key", "value")  # of an attention, in the order of `attention_factors`


@dataclass(frozen=True)
class Outside:
    """What a layer's calibrated range misses: share of elements beyond it, and the largest |x| over the threshold."""

    layer: str  # or `attention:role`
    fraction: float
    largest: float


@dataclass(frozen=True)
class Coverage:
    """`spread`: largest over smallest threshold of the two halves, by layer."""

    spread: dict[str, float]
    outside: tuple[Outside, ...]  # the worst first
    images: int  # that `outside` was measured on

    def warnings(self) -> list[str]:
        """What is beyond its limit."""
        found = []
        if self.spread and (median := statistics.median(self.spread.values())) > MAX_SPREAD:
            found.append(
                f"the calibration set is too small or too mixed: its halves disagree on the ranges by a factor {median:.2f} "
                f"in the middle of all layers (limit {MAX_SPREAD}), {max(self.spread.values()):.2f} in '{self._widest}'"
            )
        beyond = [each for each in self.outside if each.fraction > MAX_OUTSIDE]
        if beyond:
            found.append(
                f"the calibration images do not cover the evaluation images: {len(beyond)} layers clip more than "
                f"{MAX_OUTSIDE:.1%} of what they read, '{beyond[0].layer}' {beyond[0].fraction:.1%}"
            )
        return found

    def summary(self) -> str:
        """One line for the user."""
        halves = (
            f"thresholds of the halves of the images differ by a factor of {statistics.median(self.spread.values()):.2f}"
            if self.spread
            else "one half of images only"
        )
        worst = self.outside[0]
        clipped = f"at most {worst.fraction:.2%} of the values are clipped, in {worst.layer}"
        return f"{halves}; of {self.images} other images {clipped}"

    @property
    def _widest(self) -> str:
        return max(self.spread, key=lambda layer: self.spread[layer])

    def to_json(self) -> dict[str, Any]:
        """Plain values for the report; `spread` is None where there is one half only."""
        spread = {
            "median": statistics.median(self.spread.values()),
            "worst": self.spread[self._widest],
            "worst_layer": self._widest,
        } if self.spread else None  # fmt: skip
        return {
            "spread": spread,
            "outside": [asdict(each) for each in self.outside[:SHOWN]],
            "images": self.images,
        }


def spread(thresholds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Largest over smallest threshold by layer. A layer that reads zeros only in a half is left out: it has no ratio."""
    return {
        layer: max(halves) / min(halves) for layer, halves in thresholds.items() if len(halves) > 1 and min(halves) > 0
    }


def outside(model: QuantModel, batches: Iterable[Tensor]) -> tuple[tuple[Outside, ...], int]:
    """(by layer, the worst first; number of images): one pass of the float network over `batches` (B, 3, H, W)."""
    quantizers = {name: f"{name}:input" for name in model.quantized_layers}
    quantizers |= {f"{name}:{role}": f"{name}:{role}" for name in model.int8_attention for role in FACTORS}
    # the last value that still rounds to 127: a ReLU6 is full of sixes, a hair beyond an FP16 scale's 127 steps
    thresholds = {name: float(model.qparams(quantizer).scale) * (QMAX + 0.5) for name, quantizer in quantizers.items()}
    beyond, seen, largest = dict.fromkeys(thresholds, 0), dict.fromkeys(thresholds, 0), dict.fromkeys(thresholds, 0.0)

    def count(name: str, x: Tensor) -> None:
        size = x.abs()
        beyond[name] += int((size > thresholds[name]).sum())
        seen[name] += x.numel()
        largest[name] = max(largest[name], float(size.max()))

    def look(name: str, module: nn.Module, x: Tensor) -> None:
        if name not in model.int8_attention:
            count(name, x)
            return
        factors = attention_factors(module, module.get_submodule("qkv")(x))
        for role, factor in zip(FACTORS, factors, strict=True):
            count(f"{name}:{role}", factor)

    images = 0
    with input_hooks(model.net, (*model.quantized_layers, *model.int8_attention), look), torch.inference_mode():
        for batch in batches:
            model.net(batch)
            images += len(batch)
    found = [Outside(name, beyond[name] / seen[name], largest[name] / limit) for name, limit in thresholds.items()]
    return tuple(sorted(found, key=lambda each: (-each.fraction, -each.largest))), images


def coverage(model: QuantModel, batches: Iterable[Tensor]) -> Coverage:
    """Return how the halves of the calibration set compare with each other and with held-out images (`batches`)."""
    return Coverage(spread(model.half_thresholds), *outside(model, batches))
