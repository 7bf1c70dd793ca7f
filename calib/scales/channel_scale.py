"""The scale and centre of channels that exponent and ranges give, and how one half of the images would set them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from calib.grids import Sides, input_grid, sides_of
from calib.structure.moves import Moved

LARGEST_RATIO = 100.0  # r stays within 1/100 .. 100: beyond that weights leave FP16's comfortable range


def channel_scale(low: Tensor, high: Tensor, exponent: float, centred: bool) -> tuple[Tensor, Tensor]:
    """Return (r, m), both (C,), from per-channel extremes of x. A channel that is constant keeps r = 1."""
    shift = (low + high) / 2 if centred else torch.zeros_like(low)
    reach = torch.maximum((high - shift).abs(), (low - shift).abs()).double()
    alive = reach > 1e-6 * reach.max()
    mean = reach[alive].log().mean().exp() if alive.any() else torch.tensor(1.0)
    ratio = torch.where(alive, reach / mean, 1.0) ** exponent
    return ratio.clamp(1 / LARGEST_RATIO, LARGEST_RATIO).to(low.dtype), shift


@dataclass(frozen=True)
class FoldScale:
    """Equalisation by one half of the images, relative to that by all of them: x becomes (x - centre) factor, both (C,).

    Channel scales are fitted to the largest values of all calibration images, so that none of these images exceeds any
    channel's share; new ones do, up to three times. One half, rounded as the *other* alone would have it, shows how far.
    `widening`: how much larger the tensor's largest value is in that half's scale. `sides`: of an asymmetric range
    (calib/grids.py), by that half; None: symmetric.
    """

    centre: Tensor
    factor: Tensor
    widening: float
    sides: Sides | None = None

    def along(self, x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Return (centre, factor) in a shape that goes with `x`, whose channels lie along `axis`."""
        shape = [-1 if dimension == axis % x.ndim else 1 for dimension in range(x.ndim)]
        return self.centre.reshape(shape), self.factor.reshape(shape)

    def fake_quantize(self, x: Tensor, amax: float, bits: int, axis: int) -> Tensor:
        """Return `x`, channels along `axis`, fake-quantized; `amax`: the threshold in the scale of all images."""
        centre, factor = self.along(x, axis)
        grid = input_grid(amax * self.widening, bits, self.sides)
        return grid.fake_quantize((x - centre) * factor) / factor + centre


def fold_scale(
    low: Tensor, high: Tensor, moved: Moved | None, exponent: float, centred: bool, zero_points: bool = False
) -> FoldScale:
    """Return the scale of a half whose input has the per-channel extremes `low` and `high` (C,) after the move `moved`.

    `moved` is equalise's, with `exponent` and `centred`; None where it moved nothing. `zero_points`: the range is
    asymmetric.
    """
    if moved is None:
        sides = sides_of(low, high) if zero_points else None
        return FoldScale(torch.zeros_like(low), torch.ones_like(low), 1.0, sides)
    original = [extreme * moved.scale + moved.shift for extreme in (low, high)]
    scale, shift = channel_scale(original[0], original[1], exponent, centred)
    centre, factor = (shift - moved.shift) / moved.scale, moved.scale / scale
    extremes = (low - centre) * factor, (high - centre) * factor
    own = torch.maximum(*(extreme.abs() for extreme in extremes)).max()
    before = torch.maximum(low.abs(), high.abs()).max()
    sides = sides_of(*extremes) if zero_points else None
    return FoldScale(centre, factor, float(own / before) if before else 1.0, sides)
