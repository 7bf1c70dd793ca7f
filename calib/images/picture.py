"""One image of a set, identified by its content and read only when a batch needs it; how images are chosen."""

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

THREADS = 2  # Pillow releases the interpreter lock while it decodes
CHUNK = 32  # candidates that are read together: choosing may read up to this many files more than it needs


@dataclass(frozen=True)
class Picture:
    """An image that can be read any number of times."""

    name: str  # path inside its folder, or row of its array
    content: str  # sha256 of the bytes of the file or row: equal content means the same source image
    # of the set's preprocessing: (3, height, width) float32; of a sample's inputs: (N,)
    read: Callable[[Any], np.ndarray]
    window: str = ""  # the part of the source image that is used, if it is not the whole
    group: str = ""  # what pictures of one source have in common, where the user says so

    @property
    def source(self) -> str:
        """What pictures of one source image share."""
        return self.group or self.content


@dataclass(frozen=True)
class Unreadable:
    """A file that could not be decoded."""

    name: str
    reason: str


ImageCandidate = Callable[[], Picture | Unreadable]  # reads the file or row when it is called


@dataclass(frozen=True)
class Chosen:
    """The outcome of `choose_pictures`."""

    pictures: tuple[Picture, ...]
    unreadable: tuple[Unreadable, ...]
    overlap: int  # number of candidates left out because their content or group is excluded
    duplicates: int = 0  # ... because an earlier one has the same content


def in_random_order(candidates: Sequence[ImageCandidate], seed: int) -> list[ImageCandidate]:
    """`candidates` in a random order, which `seed` determines."""
    return [candidates[index] for index in np.random.default_rng(seed).permutation(len(candidates))]


def choose_pictures(candidates: Sequence[ImageCandidate], wanted: int, excluded: Collection[str] = ()) -> Chosen:
    """The first `wanted` (1 or more) readable candidates of distinct content outside `excluded`, in order.

    `excluded`: contents, and the sources of pictures that must not be shared.
    """
    pictures: list[Picture] = []
    unreadable: list[Unreadable] = []
    seen: set[str] = set()
    overlap = duplicates = 0
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(candidates), CHUNK):
            for found in pool.map(lambda candidate: candidate(), candidates[start : start + CHUNK]):
                if isinstance(found, Unreadable):
                    unreadable.append(found)
                elif found.content in excluded or found.source in excluded:
                    overlap += 1
                elif found.content in seen:
                    duplicates += 1
                else:
                    seen.add(found.content)
                    pictures.append(found)
                    if len(pictures) == wanted:
                        return Chosen(tuple(pictures), tuple(unreadable), overlap, duplicates)
    return Chosen(tuple(pictures), tuple(unreadable), overlap, duplicates)
