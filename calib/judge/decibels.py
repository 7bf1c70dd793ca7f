"""Signal to noise in decibels, of two sums of squares."""

import math


def decibels(signal: float, noise: float) -> float:
    """Return 10 log10(signal / noise): infinite where either is zero, -infinite where the noise is infinite."""
    if math.isinf(noise):
        return -math.inf
    return 10 * math.log10(signal / noise) if signal and noise else math.inf
