"""Batches of images, as every stage of the torch half reads them."""

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor


class Batches(Protocol):
    """A re-iterable sequence of image batches, float32 (B, 3, H, W), whose number is known."""

    def __iter__(self) -> Iterator[Tensor]: ...
    def __len__(self) -> int: ...


def spread_images(batches: Batches, count: int) -> Tensor:
    """`count` images (or all, if there are fewer), float32 (count, 3, H, W), taken evenly from `batches`.

    Neighbours are often crops of the same source image, so the first `count` images would be less varied.
    """
    share = math.ceil(count / len(batches))
    taken = torch.cat([batch[:: max(len(batch) // share, 1)][:share] for batch in batches])
    return taken[:: max(len(taken) // count, 1)][:count]
