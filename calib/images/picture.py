"""One picture of a set, known by its content and read only when a batch needs it; how pictures are chosen."""

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from calib.images.preprocess import Preprocessing

THREADS = 2  # Pillow releases the interpreter lock while it decodes
CHUNK = 32  # candidates examined at once: choosing may read up to this many files too many


@dataclass(frozen=True)
class Picture:
    """A picture that can be read again and again."""

    name: str  # path inside its folder, or row of its array
    content: str  # sha256 of the file's or row's bytes: equal content = the same photograph
    read: Callable[[Preprocessing], np.ndarray]  # -> (3, height, width) float32
    window: str = ""  # which part of the photograph, where only a part is used


@dataclass(frozen=True)
class Unreadable:
    """A file that could not be decoded."""

    name: str
    reason: str


ImageCandidate = Callable[[], Picture | Unreadable]


@dataclass(frozen=True)
class Chosen:
    """The outcome of `choose_pictures`."""

    pictures: tuple[Picture, ...]
    unreadable: tuple[Unreadable, ...]
    overlap: int  # candidates left out because their content was excluded


def in_random_order(candidates: Sequence[ImageCandidate], seed: int) -> list[ImageCandidate]:
    """`candidates` in the random order of `seed`."""
    return [candidates[index] for index in np.random.default_rng(seed).permutation(len(candidates))]


def choose_pictures(candidates: Sequence[ImageCandidate], wanted: int, excluded: Collection[str] = ()) -> Chosen:
    """The first `wanted` (1 or more) readable candidates of distinct content outside `excluded`, in order."""
    pictures: list[Picture] = []
    unreadable: list[Unreadable] = []
    seen = set(excluded)
    overlap = 0
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(candidates), CHUNK):
            for found in pool.map(lambda candidate: candidate(), candidates[start : start + CHUNK]):
                if isinstance(found, Unreadable):
                    unreadable.append(found)
                elif found.content not in seen:
                    seen.add(found.content)
                    pictures.append(found)
                    if len(pictures) == wanted:
                        return Chosen(tuple(pictures), tuple(unreadable), overlap)
                elif found.content in excluded:
                    overlap += 1
    return Chosen(tuple(pictures), tuple(unreadable), overlap)
