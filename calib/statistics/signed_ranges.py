"""Asymmetric ranges: streaming statistics that keep the sign, and the grid that loses least on them.

    s = (high - low) / (2^b - 1)        z = -round(low / s)        (calib/quantizer.py, shifted to signed integers)

RepQ-ViT's rule for (low, high) is `repq`: the two-sided percentile among three with the least squared error of the tensor
itself. Nothing here is judged by the network's output, as `search` does in calib/scales/calibrate.py: this is what
papers do.
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
PERCENTILES = (99.9, 99.99, 99.999)  # tried by RepQ-ViT

AnyGrid = TypeVar("AnyGrid", bound=Grid)


@dataclass
class SignedHistogram:
    """Counts of x over everything seen, and its exact extremes.

    `counts` (int64, (2 BINS,)): the bins of `Histogram`, first of what has no sign bit, then of what has one.
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
        """The histogram of both inputs together."""
        return SignedHistogram(self.counts + other.counts, min(self.low, other.low), max(self.high, other.high))

    def populated(self) -> tuple[Tensor, Tensor, Tensor]:
        """(lower edge, upper edge, count) of the non-empty bins in ascending order, float64, within the extremes."""
        positive, negative = (Histogram(part).populated() for part in self.counts.split(BINS))
        lower = torch.cat([-negative[1].flip(0), positive[0]])
        upper = torch.cat([-negative[0].flip(0), positive[1]])
        count = torch.cat([negative[2].flip(0), positive[2]])
        return lower.clamp(min=self.low), upper.clamp(max=self.high), count


def percentile_range(histogram: SignedHistogram, percentile: float) -> tuple[float, float]:
    """(low, high): the innermost bin edges that at least `percentile` % of the elements lie above and below."""
    lower, upper, count = histogram.populated()
    wanted = round(float(count.sum()) * percentile / 100, 3)  # without the last digits of the division
    below, above = count.cumsum(0), count.flip(0).cumsum(0)
    low = lower.flip(0)[int(torch.searchsorted(above, wanted))]
    return float(low), float(upper[int(torch.searchsorted(below, wanted))])


def least_squares_grid(histogram: SignedHistogram, grids: Iterable[AnyGrid]) -> AnyGrid:
    """The grid with the least squared rounding error over all elements; ties go to the first."""
    lower, upper, count = histogram.populated()
    centre = (lower + upper) / 2
    return min(grids, key=lambda grid: float(((grid.fake_quantize(centre) - centre) ** 2 * count).sum()))


def grid_from_histogram(histogram: SignedHistogram, observer: str, percentile: float, bits: int) -> QParams:
    """The asymmetric grid by observer: repq, max, percentile (of both sides) or mse.

    `mse` shrinks both ends alike, as FQ-ViT's OMSE.
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
