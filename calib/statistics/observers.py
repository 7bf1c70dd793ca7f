"""Observers: streaming statistics of a tensor, and the clipping threshold that each rule takes from them.

`Histogram` counts |x| in bins given by the leading bits of its float32 pattern, 8 exponent bits and 9 mantissa bits.
Every octave has 512 bins (0.1 to 0.2 % wide), and no range has to be known beforehand. Counts are only ever added, so the
result depends neither on batch size nor on order, and the histograms of several processes can be merged. The maximum is
exact.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from calib.precision import UNROUNDED
from calib.quantizer import largest_integer
from calib.statistics.entropy import entropy_amax

DROPPED_BITS = 14  # of the 23 mantissa bits of float32: values that differ in these alone share a bin
BINS = 1 << (31 - DROPPED_BITS)
CHUNK = 1 << 21  # elements counted at a time, so that temporary tensors stay small

OBSERVERS = ("max", "percentile", "mse", "entropy")

# The thresholds that `mse_amax` compares, as fractions of the maximum.
MSE_FRACTIONS = torch.linspace(1.0, 0.02, 99, dtype=torch.float64)
AT_A_TIME = 9  # of them


@dataclass
class Histogram:
    """A histogram of |x|: `counts` int64 (BINS,) over all elements observed, and their exact maximum `amax`."""

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
        """A new histogram of all elements that either of the two has observed."""
        return Histogram(self.counts + other.counts, max(self.amax, other.amax))

    def populated(self) -> tuple[Tensor, Tensor, Tensor]:
        """(lower edge, upper edge, count) of the non-empty bins in ascending order, float64."""
        bins = self.counts.nonzero().flatten()
        return _edges(bins), _edges(bins + 1), self.counts[bins].double()


def _edges(bins: Tensor) -> Tensor:
    return (bins << DROPPED_BITS).to(torch.int32).view(torch.float32).double()


def max_amax(histogram: Histogram) -> float:
    """The largest |x| observed: nothing is clipped."""
    return histogram.amax


def percentile_amax(histogram: Histogram, percentile: float) -> float:
    """The smallest bin edge with at least `percentile` % of all |x| below it, at most the maximum."""
    _, upper, count = histogram.populated()
    cumulative = count.cumsum(0)
    wanted = round(float(cumulative[-1]) * percentile / 100, 3)  # without the rounding error of the division
    index = int(torch.searchsorted(cumulative, wanted))
    return min(float(upper[index]), histogram.amax)


def mse_amax(histogram: Histogram, bits: int = 8) -> float:
    """The clipping threshold with the least mean squared error of rounding and clipping to `bits` bits.

    The thresholds compared are MSE_FRACTIONS of the maximum; of equal ones the largest is chosen.
    """
    lower, upper, count = histogram.populated()
    centre = (lower + upper) / 2
    thresholds, high = MSE_FRACTIONS.to(centre.device) * histogram.amax, largest_integer(bits)

    def errors(scales: Tensor) -> Tensor:
        rounded = torch.round(centre / scales[:, None]).clamp(max=high) * scales[:, None]
        return (rounded - centre).square() @ count

    # a few at a time, because all at once would take 100 times the memory of the histogram
    scales = (thresholds / high).clamp(min=torch.finfo(torch.float64).tiny)
    return float(thresholds[int(torch.cat([errors(few) for few in scales.split(AT_A_TIME)]).argmin())])


def amax_from_histogram(histogram: Histogram, observer: str, percentile: float, bits: int = 8) -> float:
    """The clipping threshold of |x| by one of `OBSERVERS`, in the unit of x; the maximum if `bits` is UNROUNDED.

    `percentile` (%) is for the observer of that name alone.
    """
    if bits == UNROUNDED:
        return max_amax(histogram)
    if observer == "percentile":
        return percentile_amax(histogram, percentile)
    if observer == "entropy":
        return entropy_amax(*histogram.populated(), histogram.amax, bits)
    return max_amax(histogram) if observer == "max" else mse_amax(histogram, bits)
