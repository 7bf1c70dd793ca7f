"""Mini-batches in random order from images that stream by.

The order is a function of the seed alone, so a run that stopped goes on in the same order without a saved random state.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


class Minibatch(NamedTuple):
    """Images (B, 3, H, W) and, where there are any, their classes (B,) int64."""

    images: Tensor
    labels: Tensor | None


def shuffled(items: Iterable[Item], window: int, seed: int) -> Iterator[Item]:
    """Every item once; the next is drawn from `window` that wait, and the order is uniform if no more ever do."""
    generator = torch.Generator().manual_seed(seed)

    def draw(waiting: list[Item]) -> Item:
        return waiting.pop(int(torch.randint(len(waiting), (), generator=generator)))

    waiting: list[Item] = []
    for item in items:
        waiting.append(item)
        if len(waiting) == window:
            yield draw(waiting)
    while waiting:
        yield draw(waiting)


def minibatches(
    images: Iterable[Tensor], labels: Sequence[int] | None, size: int, window: int, seed: int
) -> Iterator[Minibatch]:
    """The images of `images` (batches of any size), `size` at a time in random order; the last may be smaller."""
    single = (image.clone() for batch in images for image in batch)  # a view would keep its whole batch in memory
    group: list[tuple[int, Tensor]] = []

    def stacked() -> Minibatch:
        of_group = None if labels is None else torch.tensor([labels[index] for index, _ in group])
        return Minibatch(torch.stack([image for _, image in group]), of_group)

    for item in shuffled(enumerate(single), window, seed):
        group.append(item)
        if len(group) == size:
            yield stacked()
            group.clear()
    if group:
        yield stacked()
