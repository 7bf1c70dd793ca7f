"""AdaRound's soft choice between the two neighbours of a weight (Nagel et al., ICML 2020, sections 3.2 and 3.3).

A weight is scale (floor(w / scale) + h) with h in [0, 1], the rectified sigmoid of a number alpha that is learned:

    h(alpha) = clamp(1.2 sigmoid(alpha) - 0.1, 0, 1)

A regulariser sum 1 - |2 h - 1|^beta drives h to 0 or 1: not at all at first, then with beta falling, so that weights that
have nearly decided are pushed first and the others last.
"""

import torch
from torch import Tensor

STRETCH = 0.1  # the sigmoid reaches beyond 0 and 1 by this much on either side, so that h gets there
FREE = 0.2  # share of the steps without regulariser
BETA_FIRST, BETA_LAST = 20.0, 2.0


def soft_rounding(alpha: Tensor) -> Tensor:
    """h in [0, 1], of the shape of `alpha`."""
    return torch.clamp((1 + 2 * STRETCH) * torch.sigmoid(alpha) - STRETCH, 0, 1)


def alpha_of(share: Tensor) -> Tensor:
    """The alpha whose h is `share`, the fractional part w / scale - floor(w / scale) in [0, 1)."""
    return -torch.log((1 + 2 * STRETCH) / (share + STRETCH) - 1)


def hard_rounding(alpha: Tensor) -> Tensor:
    """0 or 1, whichever h is nearer to."""
    return (alpha >= 0).to(alpha.dtype)


def beta_at(progress: float) -> float | None:
    """The exponent after a share `progress` of the steps; None while the regulariser is off. It falls linearly."""
    if progress < FREE:
        return None
    return BETA_FIRST + (BETA_LAST - BETA_FIRST) * (progress - FREE) / (1 - FREE)


def undecided(h: Tensor, beta: float) -> Tensor:
    """The regulariser sum 1 - |2 h - 1|^beta: 0 where every h is 0 or 1."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()
