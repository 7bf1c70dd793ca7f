"""Asymmetric ranges: streaming statistics that keep the sign, and the grid with the least squared error on them.

    s = (high - low) / (2^b - 1)        z = -round(low / s)        (calib/quantizer.py, shifted to signed integers)

RepQ-ViT's rule for (low, high) is `repq`: of three two-sided percentiles, the one with the least squared error of the
tensor itself (Li et al., ICCV 2023). These rules look at one tensor, as papers do; `search` in calib/scales/calibrate.py
looks at the output of the network.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from calib.errors import UserError
from calib.grids import Grid
from calib.quantizer import QParams, qparams_from_range
from calib.statistics.observers import BINS, CHUNK, DROPPED_BITS, MSE_FRACTIONS, Histogram

REPQ = "repq"
PERCENTILES = (99.9, 99.99, 99.999)  # %, those that RepQ-ViT compares

AnyGrid = TypeVar("AnyGrid", bound=Grid)


@dataclass
class SignedHistogram:
    """A histogram of x over all elements observed, and their exact minimum `low` and maximum `high`.

    `counts` int64 (2 BINS,): the bins of `Histogram`, first of the elements without a sign bit, then of those with one.
    """

    counts: Tensor = field(default_factory=lambda: torch.zeros(2 * BINS, dtype=torch.int64))
    low: float = float("inf")
    high: float = -float("inf")

    def update(self, x: Tensor) -> None:
        """Count every element of `x` (any shape; computed in float32). Raises ValueError on NaN or Inf."""
        x = x.detach().float().contiguous()
        low, high = (float(value) for value in torch.aminmax(x))
        if not max(-low, high) < float("inf"):
            raise ValueError("an observed tensor holds NaN or Inf")
        self.low, self.high = min(self.low, low), max(self.high, high)
        for part in x.view(-1).split(CHUNK):
            keys = part.view(torch.int32).bitwise_right_shift(DROPPED_BITS).bitwise_and_(2 * BINS - 1)
            self.counts += torch.bincount(keys, minlength=2 * BINS)

    def merge(self, other: "SignedHistogram") -> "SignedHistogram":
        """A new histogram of all elements that either of the two has observed."""
        return SignedHistogram(self.counts + other.counts, min(self.low, other.low), max(self.high, other.high))

    def populated(self) -> tuple[Tensor, Tensor, Tensor]:
        """(lower edge, upper edge, count) of the non-empty bins in ascending order, float64, within the extremes."""
        positive, negative = (Histogram(part).populated() for part in self.counts.split(BINS))
        lower = torch.cat([-negative[1].flip(0), positive[0]])
        upper = torch.cat([-negative[0].flip(0), positive[1]])
        count = torch.cat([negative[2].flip(0), positive[2]])
        return lower.clamp(min=self.low), upper.clamp(max=self.high), count


def percentile_range(histogram: SignedHistogram, percentile: float) -> tuple[float, float]:
    """(low, high): the innermost bin edges with at least `percentile` % of the elements above low, and below high."""
    lower, upper, count = histogram.populated()
    wanted = round(float(count.sum()) * percentile / 100, 3)  # without the rounding error of the division
    below, above = count.cumsum(0), count.flip(0).cumsum(0)
    low = lower.flip(0)[int(torch.searchsorted(above, wanted))]
    return float(low), float(upper[int(torch.searchsorted(below, wanted))])


def least_squares_grid(histogram: SignedHistogram, grids: Iterable[AnyGrid]) -> AnyGrid:
    """The one of `grids` with the least sum of squared rounding errors over all elements; the first of equal ones."""
    lower, upper, count = histogram.populated()
    centre = (lower + upper) / 2
    return min(grids, key=lambda grid: float(((grid.fake_quantize(centre) - centre) ** 2 * count).sum()))


def grid_from_histogram(histogram: SignedHistogram, observer: str, percentile: float, bits: int) -> QParams:
    """The asymmetric grid by one of the observers repq, max, percentile (of both sides) and mse.

    `mse` shrinks low and high by the same factor, as FQ-ViT's OMSE does. Raises UserError for `entropy`.
    """
    if observer == "entropy":
        raise UserError("observer 'entropy' knows symmetric ranges only: expected search, repq, max, percentile or mse")
    percentiles = {REPQ: PERCENTILES, "percentile": (percentile,)}.get(observer, ())
    fractions = {"max": (1.0,), "mse": MSE_FRACTIONS.tolist()}.get(observer, ())
    ranges = [percentile_range(histogram, each) for each in percentiles]
    ranges += [(each * histogram.low, each * histogram.high) for each in fractions]
    return least_squares_grid(
        histogram, [qparams_from_range(torch.tensor(low), torch.tensor(high), bits=bits) for low, high in ranges]
    )
