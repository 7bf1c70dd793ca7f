"""Images as the stages read them, and which part of the calibration images each image belongs to.

Calibration images are split into two halves, each half into two parts, so that all crops of one source image lie in the same
part. What is fitted on one half is tried on the other: one part of it chooses among candidates, the other judges the choice.
Then the parts change roles, so that every source image judges once (calib/judge/held_out.py).
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

ROTATIONS = ((0, 1), (1, 0))  # (part that chooses, part that judges), of either half


class Batches(Protocol):
    """Re-iterable batches (B, 3, H, W) float32 of known number."""

    def __iter__(self) -> Iterator[Tensor]: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Part:
    """Images with one role. `sources`: the number of each image's source image; None: every image is one of its own."""

    batches: Batches
    sources: Sequence[int] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


@dataclass(frozen=True)
class Half:
    """One half of the calibration images: all of it to fit on, its two parts to try what was fitted on the other half."""

    parts: tuple[Part, Part]

    def __iter__(self) -> Iterator[Tensor]:
        return itertools.chain(*self.parts)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)


def _spread(batches: Batches, count: int) -> tuple[Tensor, list[int]]:
    share = math.ceil(count / len(batches))
    taken: list[Tensor] = []
    positions: list[int] = []
    start = 0
    for batch in batches:
        picks = range(0, len(batch), max(len(batch) // share, 1))[:share]
        taken.append(batch[list(picks)])
        positions += [start + pick for pick in picks]
        start += len(batch)
    thinned = slice(None, None, max(len(positions) // count, 1))
    return torch.cat(taken)[thinned][:count], positions[thinned][:count]


def spread_images(batches: Batches, count: int) -> Tensor:
    """Return `count` images (or all, if there are fewer) taken evenly: neighbours often show the same source image."""
    return _spread(batches, count)[0]


def spread_with_sources(part: Part, count: int) -> tuple[Tensor, list[int]]:
    """Return the images of `spread_images` and the number of the source image of each."""
    images, positions = _spread(part, count)
    return images, positions if part.sources is None else [part.sources[position] for position in positions]
