"""AdaRound's soft choice between the two neighbours of a weight (Nagel et al., ICML 2020, sections 3.2 and 3.3).

A weight is scale (floor(w / scale) + h) with h in [0, 1], the rectified sigmoid of a number alpha that is learned:

    h(alpha) = clamp(1.2 sigmoid(alpha) - 0.1, 0, 1)

The regulariser sum 1 - |2 h - 1|^beta drives h to 0 or 1. It is off at first; then beta falls, so that it acts first on
weights whose h is near 0 or 1 and last on the others.
"""

import torch
from torch import Tensor

STRETCH = 0.1  # the stretched sigmoid exceeds 0 and 1 by this much, so that a finite alpha gives h = 0 or 1
FREE = 0.2  # share of the steps that have no regulariser
BETA_FIRST, BETA_LAST = 20.0, 2.0


def soft_rounding(alpha: Tensor) -> Tensor:
    """h(alpha) in [0, 1], in the shape of `alpha` (eq. 23)."""
    return torch.clamp((1 + 2 * STRETCH) * torch.sigmoid(alpha) - STRETCH, 0, 1)


def alpha_of(share: Tensor) -> Tensor:
    """The alpha with h(alpha) = `share` (any shape), the fractional part w / scale - floor(w / scale) in [0, 1)."""
    return -torch.log((1 + 2 * STRETCH) / (share + STRETCH) - 1)


def hard_rounding(alpha: Tensor) -> Tensor:
    """h(alpha) rounded to 0 or 1, in the shape of `alpha`."""
    return (alpha >= 0).to(alpha.dtype)


def beta_at(progress: float) -> float | None:
    """The exponent beta after the share `progress` (0 to 1) of all steps; None while the regulariser is off.

    It falls linearly from BETA_FIRST to BETA_LAST.
    """
    if progress < FREE:
        return None
    return BETA_FIRST + (BETA_LAST - BETA_FIRST) * (progress - FREE) / (1 - FREE)


def undecided(h: Tensor, beta: float) -> Tensor:
    """The regulariser sum 1 - |2 h - 1|^beta (): 0 if every h is 0 or 1 (eq. 24)."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()
