"""AdaQTransform in closed form: a gain and an offset per output channel on top of weights rounded to nearest.

The transform (xi, eta) of AdaQTransform costs an engine nothing:

    y = xi (W^ x^) + b + eta        W^ = s q        =>   scale xi s, bias b + eta, the same integers q

The paper learns xi and eta with the rounding; with the rounding given, least squares has the answer. With z = W^ x^ and
t = y - b of the layer that is not rounded,

    xi = Cov(t, z) / Var(z)        eta = mean t - xi mean z

The scale is rounded to FP16 first and eta is the best for the scale that runs. An engine's scales are positive, so a
negative xi changes the sign of the row's integers, which the narrow range [-127, 127] allows.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calib.images.batches import ROTATIONS, Half
from calib.judge.held_out import Candidate, Offer
from calib.layerwise.layer_fits import LayerTrials, fitted_layers
from calib.layerwise.subsets import layer_candidates
from calib.network.layer_rows import product
from calib.network.rounded_layer import RoundedLayer, augmented_weight, rounded_layers, with_gain_and_offset
from calib.quant_model import QuantModel
from calib.quantizer import fp16_scale
from calib.store.watch import UNWATCHED, Watch


@dataclass(frozen=True)
class Config:
    """On how much data the correction is fitted."""

    rows: int = 131072  # rows of a layer's input over the whole calibration set

    def __post_init__(self) -> None:
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
        """Return the sums over the rows of both operands."""
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


def best_correction(sums: Sequence[Sequence[ChannelSums]]) -> LayerTrials:
    """Return the corrected layer where the correction lowers its error on images that it was not fitted on.

    `sums[i][p]`: those over part p of half i.
    """
    rounded = sums[0][0].rounded
    halves = [functools.reduce(ChannelSums.merge, of_half) for of_half in sums]
    found = [correction(of_half) for of_half in halves]

    def helps(parts: Sequence[int]) -> bool:
        others = [(sums[index - 1][part], one) for index, one in enumerate(found) for part in parts]
        return sum(part.error(*one) for part, one in others) < sum(float(part.sums[5].sum()) for part, _ in others)

    layers = [with_gain_and_offset(rounded, *one) for one in found]
    whole = with_gain_and_offset(rounded, *correction(functools.reduce(ChannelSums.merge, halves)))
    return LayerTrials(
        tuple(layers if helps([part]) else None for part, _ in ROTATIONS),
        whole if helps([part for part, _ in ROTATIONS]) else None,
    )


def candidates(
    model: QuantModel, plain: Candidate, halves: Sequence[Half], config: Config, watch: Watch = UNWATCHED
) -> Offer:
    """Offer `plain` with a gain and an offset on the output channels of the layers."""
    rounded = rounded_layers(plain.whole)

    def new_sums(name: str) -> ChannelSums:
        return ChannelSums(augmented_weight(model.net.get_submodule(name)), rounded[name])

    found = fitted_layers(model, halves, config.rows, new_sums, lambda _name, sums: best_correction(sums), watch)
    notes = (f"{len(found.whole)} of {len(rounded)} layers corrected",)
    return Offer(layer_candidates(plain, found, halves), notes)
