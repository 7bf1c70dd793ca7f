"""The share of top-1 results that a network lost, for the tasks that have them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deploy.measure.accuracy import Fidelity


def points(share: float) -> float:
    """Return `share` in percentage points, without the rounding error of counts that were divided."""
    return round(100 * share, 9)


def points_lost(found: "Fidelity") -> tuple[float, str]:
    """Return (percentage points, what they are in words): of accuracy on labels, without labels of agreement."""
    if found.top1 is not None and found.reference_top1 is not None:
        drop = points(found.reference_top1 - found.top1)
        return drop, f"top-1 accuracy falls by {drop:.2f} points"
    if found.top1_agreement is None:
        raise ValueError("no top-1 results were measured")
    other = points(1 - found.top1_agreement)
    return other, f"{other:.2f} % of the top-1 results differ"
