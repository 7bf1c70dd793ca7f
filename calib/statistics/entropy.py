"""The clipping threshold with the least relative entropy (KL divergence) between a histogram and its rounded version.

This is TensorRT's entropy calibrator (Migacz, "8-bit inference with TensorRT", GTC 2017). For every threshold, P is the
histogram up to the threshold, with all mass beyond it in the last bin, and Q is P merged into as many levels as |q| has
(128 for 8 bits), where the mass of a level is spread evenly over its bins that are not empty. The threshold with the least
KL(P || Q) is chosen; of equal ones the largest.
"""

import torch
from torch import Tensor

from calib.quantizer import largest_integer

BINS = 2048  # of equal width, from 0 to the maximum
BINS_BETWEEN_THRESHOLDS = 16  # bins between thresholds tried: 0.8 % of the maximum


def linear_counts(lower: Tensor, upper: Tensor, count: Tensor, amax: float, bins: int = BINS) -> Tensor:
    """Counts (bins,) of `bins` equally wide bins from 0 to `amax`, from the given bins (each (n,) float64, ascending).

    The mass of a bin is taken to lie evenly between its edges.
    """
    points = torch.stack([lower, upper.clamp(max=amax)], dim=1).flatten()
    below = torch.stack([count.cumsum(0) - count, count.cumsum(0)], dim=1).flatten()
    edges = torch.linspace(0, amax, bins + 1, dtype=torch.float64, device=points.device)
    index = torch.searchsorted(points, edges, right=True).clamp(1, len(points) - 1)
    left, right = points[index - 1], points[index]
    share = torch.where(right > left, (edges - left) / (right - left).clamp(min=1e-300), 1.0).clamp(0, 1)
    return torch.lerp(below[index - 1], below[index], share).diff()


def relative_entropies(counts: Tensor, kept: Tensor, levels: int = 128) -> Tensor:
    """KL(P || Q) in nats (n,) of `counts` (bins,) clipped to their first `kept` (n,) bins and rounded to `levels` levels."""
    bins = torch.arange(len(counts), device=counts.device)
    inside = bins < kept[:, None]
    last = bins == kept[:, None] - 1
    clipped = torch.where(inside, counts, 0.0)
    reference = clipped + last * (counts.sum() - clipped.sum(1, keepdim=True))
    filled = (clipped > 0).to(counts.dtype)
    level = (bins * levels // kept[:, None]).clamp(max=levels - 1)
    zeros = counts.new_zeros(len(kept), levels)
    mass, share = zeros.scatter_add(1, level, clipped), zeros.scatter_add(1, level, filled)
    spread = (mass / share.clamp(min=1)).gather(1, level) * filled
    p, q = (each / each.sum(1, keepdim=True) for each in (reference, spread))
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum(1)  # infinite where P has mass and Q has none


def entropy_amax(lower: Tensor, upper: Tensor, count: Tensor, amax: float, bits: int = 8) -> float:
    """The clipping threshold of |x| with the least relative entropy, in the unit of x; 0 if `amax` is 0.

    `lower`, `upper`, `count`: edges and counts of the bins of |x|, each (n,) float64, ascending.
    """
    if not amax:
        return 0.0
    counts = linear_counts(lower, upper, count, amax)
    counts[0] = counts[1]  # exact zeros would outweigh everything: they round to 0 at any scale
    levels = largest_integer(bits) + 1
    kept = torch.arange(BINS, levels - 1, -BINS_BETWEEN_THRESHOLDS, device=counts.device)
    return amax * int(kept[relative_entropies(counts, kept, levels).argmin()]) / BINS
