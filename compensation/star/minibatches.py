"""Mini-batches in random order from images that stream by.

The order is a function of the seed alone, so a run that stopped goes on in the same order without a saved random state.
"""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


def shuffled(items: Iterable[Item], window: int, seed: int) -> Iterator[Item]:
    """Yield every item once; the next is drawn from `window` that wait, and the order is uniform if no more ever do."""
    generator = torch.Generator().manual_seed(seed)

    def draw(waiting: list[Item]) -> Item:
        return waiting.pop(int(torch.randint(len(waiting), (), generator=generator, device="cpu")))

    waiting: list[Item] = []
    for item in items:
        waiting.append(item)
        if len(waiting) == window:
            yield draw(waiting)
    while waiting:
        yield draw(waiting)


def minibatches(images: Iterable[Tensor], size: int, window: int, seed: int) -> Iterator[Tensor]:
    """Yield the images of `images` (batches of any size), `size` at a time in random order; the last may be smaller."""
    single = (image.clone() for batch in images for image in batch)  # a view would keep its whole batch in memory
    group: list[Tensor] = []
    for image in shuffled(single, window, seed):
        group.append(image)
        if len(group) == size:
            yield torch.stack(group)
            group.clear()
    if group:
        yield torch.stack(group)
