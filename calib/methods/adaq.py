"""AdaQTransform in closed form: a gain and an offset per output channel on top of another method's integers.

The transform (xi, eta) of AdaQTransform costs an engine nothing:

    y = xi (W^ x^) + b + eta        W^ = s q        =>   scale xi s, bias b + eta, the same integers q

The paper learns xi and eta with the rounding; with the rounding given, least squares has the answer. With z = W^ x^ and
t = y - b of the layer that is not rounded,

    xi = Cov(t, z) / Var(z)        eta = mean t - xi mean z

The scale is rounded to FP16 first and eta is the best for the scale that runs. An engine's scales are positive, so a
negative xi changes the sign of the row's integers, which the narrow range [-127, 127] allows.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from calib.images.batches import Batches
from calib.judge.held_out import adopt_if_better
from calib.layerwise.layer_sums import add_inputs
from calib.methods import erq, rtn
from calib.network.layer_rows import product
from calib.network.rounded_layer import RoundedLayer, augmented_weight, rounded_layer, with_gain_and_offset
from calib.quant_model import QuantModel, StageRecord
from calib.quantizer import fp16_scale
from calib.store.watch import UNWATCHED, Watch

BASES: dict[str, tuple[Callable[..., QuantModel], Any]] = {
    "rtn": (rtn.reduce_error, rtn.Config(bias_correction=True)),
    "erq": (erq.reduce_error, erq.Config()),
}


@dataclass(frozen=True)
class Config:
    """Whose integers are corrected, and on how much data."""

    base: str = "rtn"  # rtn | erq
    rows: int = 131072  # rows of a layer's input over the whole calibration set

    def __post_init__(self) -> None:
        if self.base not in BASES:
            raise ValueError(f"base '{self.base}' is not one of {', '.join(BASES)}")
        if self.rows < 1:
            raise ValueError(f"rows {self.rows} is not a positive number")


class ChannelSums:
    """Sums per output channel of z and of what it lacks, e = t - z, for a layer with [W, b] `weight` (G, N, K + 1)."""

    def __init__(self, weight: Tensor, rounded: RoundedLayer) -> None:
        self.weight, self.rounded = weight.float(), rounded
        self.sums = weight.new_zeros(6, *rounded.bias.shape)  # 1, z, e, z^2, z e, e^2

    def update(self, x: Tensor, rounded: Tensor) -> None:
        """Add rows of the layer's input before and after rounding, both (T, G, K)."""
        z = product(rounded, self.rounded.weight).double()
        y = product(x, self.weight[..., :-1]) + self.weight[..., None, :, -1]
        e = (y - self.rounded.bias[:, None]).double() - z
        self.sums += torch.stack([value.sum(1) for value in (torch.ones_like(z), z, e, z * z, z * e, e * e)])

    def merge(self, other: "ChannelSums") -> "ChannelSums":
        """The rows of both; neither is changed."""
        merged = ChannelSums(self.weight, self.rounded)
        merged.sums = self.sums + other.sums
        return merged

    def gain(self) -> Tensor:
        """xi (G, N); 1 where z does not vary."""
        count, z, e, zz, ze, _ = self.sums
        variance = zz - z * z / count
        varies = variance > 1e-12 * zz
        return torch.where(varies, 1 + (ze - z * e / count) / torch.where(varies, variance, 1.0), 1.0)

    def offset(self, gain: Tensor) -> Tensor:
        """eta (G, N), the best for `gain`."""
        count, z, e = self.sums[:3]
        return (e - (gain - 1) * z) / count

    def error(self, gain: Tensor, offset: Tensor) -> float:
        """sum |t - gain z - offset|^2."""
        count, z, e, zz, ze, ee = self.sums
        more = gain - 1
        squared = ee + more.square() * zz + count * offset.square() - 2 * (more * ze + offset * e - more * offset * z)
        return float(squared.sum())


def correction(sums: ChannelSums) -> tuple[Tensor, Tensor]:
    """(xi, eta) (G, N) with xi s an FP16 number."""
    scale = sums.rounded.params.scale.reshape(sums.rounded.bias.shape).double()
    gain = sums.gain()
    gain = torch.where(gain < 0, -1.0, 1.0) * fp16_scale(gain.abs() * scale) / scale
    return gain, sums.offset(gain)


def best_fits(folds: Sequence[ChannelSums]) -> tuple[RoundedLayer, ...]:
    """The layer corrected by each fold, then by all of them; empty if that does not help across folds."""
    fits = [correction(sums) for sums in folds]
    before = sum(float(sums.sums[5].sum()) for sums in folds)
    if sum(folds[index - 1].error(*one) for index, one in enumerate(fits)) >= before:
        return ()
    fits.append(correction(functools.reduce(ChannelSums.merge, folds)))
    return tuple(with_gain_and_offset(folds[0].rounded, *one) for one in fits)


def reduce_error(model: QuantModel, folds: Sequence[Batches], config: Config, watch: Watch = UNWATCHED) -> QuantModel:
    """`model` as the base method rounds it, its output channels corrected where that helps across photographs.

    `folds` are parts of the calibration set without a common photograph; what one suggests is judged on another.
    """
    reduce_base, options = BASES[config.base]
    base = reduce_base(model, folds, options, watch)
    start = time.perf_counter()
    rows = max(1, config.rows // sum(len(batches) for batches in folds))
    rounded = {
        name: rounded_layer(base.net.get_submodule(name), base.qparams(f"{name}:weight"))
        for name in base.quantized_layers
    }
    sums = [
        {name: ChannelSums(augmented_weight(model.net.get_submodule(name)), layer) for name, layer in rounded.items()}
        for _ in folds
    ]
    for of_fold, batches in zip(sums, folds, strict=True):
        add_inputs(of_fold, model, batches, rows)
    found: list[dict[str, RoundedLayer]] = [{} for _ in range(len(folds) + 1)]  # by fold, then by all of them
    for name in rounded:
        if fits := best_fits([of_fold[name] for of_fold in sums]):
            for layers, one in zip(found, fits, strict=True):
                layers[name] = one
    adopted, db_before, db_after, note = adopt_if_better(base, found, folds)
    notes = (f"{len(found[-1])} of {len(rounded)} layers corrected on top of {config.base}", note)
    record = StageRecord("adaq", asdict(config), time.perf_counter() - start, db_before, db_after, notes)
    return adopted.with_record(record)
