"""RepQ-ViT's scale reparametrisation: one range per channel of a LayerNorm's output becomes one for the whole tensor.

    s~ = mean s      z~ = round(mean z)      r = s / s~      t = -(z - z~) s~
    gamma' = gamma / r      beta' = beta / r - t      W' = W diag(r)      b' = b + W' t

which is a move as in calib/structure/moves.py: x' = (x - m) / r with m = r t. Rounding x' with (s~, z~) is rounding
x per channel with (s, z), exactly. (The paper's code does not round z~, which moves all grids by a fraction of a step.)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from calib.quantizer import QParams, fp16_scale, qparams_from_range
from calib.statistics.signed_ranges import PERCENTILES

SMALLEST_SHARE = 0.01  # of the mean range: a constant channel has none, and a small r makes a weight's column too small


class Reparametrised(NamedTuple):
    """What moves, `scale` r and `shift` m, both (C,), and the `grid` of the tensor afterwards."""

    scale: Tensor
    shift: Tensor
    grid: QParams


def channel_ranges(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(low, high), both (C,), of `x` (T, C): for each channel the two-sided percentile with the least squared error."""
    tails = torch.tensor(PERCENTILES, dtype=x.dtype) / 100
    lows, highs = torch.quantile(x, torch.cat([1 - tails, tails]), dim=0).split(len(PERCENTILES))
    grids = [qparams_from_range(low, high, axis=1, bits=bits) for low, high in zip(lows, highs, strict=True)]
    errors = torch.stack([(grid.fake_quantize(x) - x).square().sum(0) for grid in grids])
    best = errors.argmin(0, keepdim=True)
    return lows.gather(0, best)[0], highs.gather(0, best)[0]


def reparametrised(low: Tensor, high: Tensor, bits: int) -> Reparametrised:
    """From ranges per channel, both (C,)."""
    reach = high - low
    reach = reach.clamp(min=float(reach.mean()) * SMALLEST_SHARE)
    channels = qparams_from_range(low, low + reach, axis=-1, bits=bits)
    assert channels.zero_point is not None
    step, zero_point = fp16_scale(channels.scale.mean()), channels.zero_point.mean().round()
    shift = -(channels.zero_point - zero_point) * channels.scale
    return Reparametrised(channels.scale / step, shift, QParams(step, bits=bits, zero_point=zero_point))
