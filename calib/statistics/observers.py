"""Streaming statistics of a tensor -> the scale it is quantized with.

`Histogram` counts |x| in bins that are the leading bits of the float32 pattern: 8 exponent bits and 9 mantissa
bits, so every octave has 512 bins (0.14-0.2 % wide) and no range has to be known beforehand. Nothing is ever
re-binned: counts only add up, which makes the result independent of batch size and order, and lets several
processes merge theirs. The maximum is kept exactly.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from calib.precision import UNROUNDED
from calib.quantizer import largest_integer
from calib.statistics.entropy import entropy_amax

DROPPED_BITS = 14  # mantissa bits of float32 (23) that a bin does not tell apart
BINS = 1 << (31 - DROPPED_BITS)
CHUNK = 1 << 21  # elements counted at a time: temporaries stay small enough to be reused

OBSERVERS = ("max", "percentile", "mse", "entropy")

# Thresholds tried by `mse_amax`, as fractions of the maximum.
MSE_FRACTIONS = torch.linspace(1.0, 0.02, 99, dtype=torch.float64)


@dataclass
class Histogram:
    """Counts of |x| over everything seen (`counts`, int64, (BINS,)) and the exact maximum (`amax`)."""

    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.int64))
    amax: float = 0.0

    def update(self, x: Tensor) -> None:
        """Count every element of `x` (any shape; computed in float32). Raises ValueError on NaN or Inf."""
        x = x.detach().float().contiguous()
        low, high = (float(value) for value in torch.aminmax(x))
        amax = max(-low, high)
        if not amax < float("inf"):
            raise ValueError("an observed tensor holds NaN or Inf")
        self.amax = max(self.amax, amax)
        for part in x.view(-1).split(CHUNK):
            keys = part.view(torch.int32).bitwise_right_shift(DROPPED_BITS).bitwise_and_(BINS - 1)
            self.counts += torch.bincount(keys, minlength=BINS)

    def merge(self, other: "Histogram") -> "Histogram":
        """The histogram of both inputs together."""
        return Histogram(self.counts + other.counts, max(self.amax, other.amax))

    def populated(self) -> tuple[Tensor, Tensor, Tensor]:
        """(lower edge, upper edge, count) of the non-empty bins in ascending order, float64."""
        bins = self.counts.nonzero().flatten()
        return _edges(bins), _edges(bins + 1), self.counts[bins].double()


def _edges(bins: Tensor) -> Tensor:
    return (bins << DROPPED_BITS).to(torch.int32).view(torch.float32).double()


def max_amax(histogram: Histogram) -> float:
    """Largest |x| seen: nothing is clipped."""
    return histogram.amax


def percentile_amax(histogram: Histogram, percentile: float) -> float:
    """Smallest bin edge that at least `percentile` % of the elements lie below, never above the maximum."""
    _, upper, count = histogram.populated()
    cumulative = count.cumsum(0)
    wanted = round(float(cumulative[-1]) * percentile / 100, 3)  # without the last digits of the division
    index = int(torch.searchsorted(cumulative, wanted))
    return min(float(upper[index]), histogram.amax)


def mse_amax(histogram: Histogram, bits: int = 8) -> float:
    """Clipping threshold with the least mean squared rounding + clipping error at `bits` bits.

    Fractions of the maximum in steps of 1 % are tried; ties go to the larger threshold (less clipping).
    """
    lower, upper, count = histogram.populated()
    centre = (lower + upper) / 2
    thresholds, high = MSE_FRACTIONS * histogram.amax, largest_integer(bits)

    def error(scale: Tensor) -> Tensor:
        rounded = torch.round(centre / scale).clamp(max=high) * scale
        return ((rounded - centre) ** 2 * count).sum()

    # one at a time: all at once take 100 times the memory of the histogram
    errors = torch.stack([error(scale) for scale in (thresholds / high).clamp(min=torch.finfo(torch.float64).tiny)])
    return float(thresholds[int(errors.argmin())])


def amax_from_histogram(histogram: Histogram, observer: str, percentile: float, bits: int = 8) -> float:
    """Clipping threshold by the observer of that name, one of `OBSERVERS`; the maximum where nothing rounds."""
    if bits == UNROUNDED:
        return max_amax(histogram)
    if observer == "percentile":
        return percentile_amax(histogram, percentile)
    if observer == "entropy":
        return entropy_amax(*histogram.populated(), histogram.amax, bits)
    return max_amax(histogram) if observer == "max" else mse_amax(histogram, bits)
