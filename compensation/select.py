"""Which blocks get a branch, and of which form, within a budget of kernels and bytes.

A branch is worth the squared error per sample that it removes on images it was not fitted on. Blocks of a residual network
add to one stream, which makes errors of different blocks comparable.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

UNLIMITED = -1


@dataclass(frozen=True)
class Option:
    """A branch that may be taken: `gain` of the block's squared `error`, for so many kernels and bytes."""

    block: str
    form: str
    gain: float
    error: float
    kernels: int
    bytes: int


def _fits(value: int, limit: int) -> bool:
    return limit == UNLIMITED or value <= limit


def select(
    options: Sequence[Option], min_r2_per_kernel: float, max_kernels: int = UNLIMITED, max_bytes: int = UNLIMITED
) -> dict[str, Option]:
    """At most one option per block.

    Greedily: first what costs no kernel, by gain, then what gains most per kernel; every further kernel must bring at least
    `min_r2_per_kernel` of its block's error. Both limits hold for all blocks together.
    """
    chosen: dict[str, Option] = {}
    while True:
        kernels, size = (sum(getattr(one, cost) for one in chosen.values()) for cost in ("kernels", "bytes"))
        steps = []
        for one in options:
            now = chosen.get(one.block)
            gain = one.gain - (now.gain if now else 0.0)
            more = one.kernels - (now.kernels if now else 0)
            affordable = _fits(kernels + more, max_kernels) and _fits(
                size + one.bytes - (now.bytes if now else 0), max_bytes
            )
            if gain > max(0.0, min_r2_per_kernel * more * one.error) and affordable:
                steps.append(((more <= 0, gain / max(more, 1)), one))
        if not steps:
            return chosen
        best = max(steps, key=lambda step: step[0])[1]
        chosen[best.block] = best


def front(options: Sequence[Option], min_r2_per_kernel: float) -> list[dict[str, Any]]:
    """What every number of extra kernels buys: `kernels`, `bytes`, and `r2`, the share of all blocks' error taken away."""
    errors = {one.block: one.error for one in options}
    if not errors:
        return []
    points: list[dict[str, Any]] = []
    most = sum(max((one.kernels for one in options if one.block == block), default=0) for block in errors)
    for limit in range(most + 1):
        chosen = select(options, min_r2_per_kernel, limit).values()
        point = {
            "kernels": sum(one.kernels for one in chosen),
            "bytes": sum(one.bytes for one in chosen),
            "r2": sum(one.gain for one in chosen) / sum(errors.values()),
        }
        if point not in points:
            points.append(point)
    return points
