"""Images as the stages read them."""

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor


class Batches(Protocol):
    """Re-iterable batches (B, 3, H, W) float32 of known number."""

    def __iter__(self) -> Iterator[Tensor]: ...
    def __len__(self) -> int: ...


def spread_images(batches: Batches, count: int) -> Tensor:
    """`count` images (or all, if there are fewer) taken evenly from `batches`: neighbours often share a photograph."""
    share = math.ceil(count / len(batches))
    taken = torch.cat([batch[:: max(len(batch) // share, 1)][:share] for batch in batches])
    return taken[:: max(len(taken) // count, 1)][:count]
