"""The one scale of an INT8 product whose output channels have scales of their own."""

import math


def tensor_scale(largest: float) -> float:
    """The smallest power of two that `largest`, the largest of the channels' scales, does not exceed; at most 1.

    Divided by it, no scale exceeds 1, and all are as far from subnormal as possible. Were it above 1, a small scale could
    lose bits.
    """
    mantissa, exponent = math.frexp(largest)  # largest = mantissa * 2^exponent, 0.5 <= mantissa < 1
    return math.ldexp(1.0, min(exponent - int(mantissa == 0.5), 0))
