"""Streaming image sets: the calibration images, and the evaluation images that the result is judged on.

The two sets share no source image, so an error measured on the second set holds for new images.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np

from calib.errors import UserError
from calib.images.arrays import SUFFIXES, array_from_file, labels_from_file, row_candidates
from calib.images.folder import file_candidates, image_names, labels_from_names
from calib.images.picture import THREADS, Chosen, ImageCandidate, Picture, choose_pictures, in_random_order
from calib.images.preprocess import Preprocessing
from calib.images.sample_photos import CALIBRATION_PHOTOS, EVALUATION_PHOTOS, random_crops

HELD_OUT = 128  # images kept for evaluation when no number is asked for


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order. They are read again at each iteration and are never all in memory."""

    source: str  # where the images come from, for the report
    preprocessing: Preprocessing
    pictures: tuple[Picture, ...]
    sample: bool = False  # True: crops of the built-in sample images, not for production
    skipped: tuple[str, ...] = ()  # unreadable files found while choosing (none in a held-out set)
    labels: tuple[int, ...] | None = None  # class index of each image
    overlap: int = 0  # evaluation files left out because their content is in the calibration set

    @property
    def count(self) -> int:
        """The number of images."""
        return len(self.pictures)

    @property
    def sha256(self) -> str:
        """Hex sha256 of the preprocessing and of the contents and windows of all images, in order."""
        digest = hashlib.sha256(json.dumps(self.preprocessing.to_json(), sort_keys=True).encode())
        for picture in self.pictures:
            digest.update(f"\n{picture.content} {picture.window}".encode())
        return digest.hexdigest()

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """Yield batches float32 (batch_size, 3, H, W) in the order of the set; the last one may be smaller.

        Raises `UserError` for a batch size below 1, `OSError` for a file that vanished since it was chosen.
        """
        _check_at_least(1, "batch size", batch_size)
        with ThreadPoolExecutor(THREADS) as pool:
            for start in range(0, self.count, batch_size):
                chunk = self.pictures[start : start + batch_size]
                yield np.stack(list(pool.map(lambda picture: picture.read(self.preprocessing), chunk)))

    @property
    def sources(self) -> tuple[int, ...]:
        """Number of the source image of every picture; crops of one image have the same."""
        numbers: dict[str, int] = {}
        return tuple(numbers.setdefault(picture.content, len(numbers)) for picture in self.pictures)

    def halves(self) -> tuple[tuple["ImageSet", "ImageSet"], tuple["ImageSet", "ImageSet"]]:
        """Return two halves without a common source image, each in two parts without a common source image.

        With fewer than four source images, parts share some of them; a set of one or two pictures repeats them.
        """
        by_content: dict[str, list[Picture]] = {}
        for picture in self.pictures:
            by_content.setdefault(picture.content, []).append(picture)
        first, second = (_dealt(half) for half in _dealt([by_content[content] for content in sorted(by_content)]))
        return self._parts(*first), self._parts(*second)

    def _parts(self, *parts: list[list[Picture]]) -> tuple["ImageSet", "ImageSet"]:
        one, other = (replace(self, pictures=tuple(chain.from_iterable(part)), labels=None) for part in parts)
        return one, other

    def subset(self, start: int, stop: int) -> "ImageSet":
        """Images `start` to `stop` (excluded) with their labels; indices beyond the end are cut off as in a slice."""
        return replace(
            self,
            source=f"{self.source} [{start}:{stop}]",
            pictures=self.pictures[start:stop],
            labels=None if self.labels is None else self.labels[start:stop],
        )


def _dealt(sources: list[list[Picture]]) -> tuple[list[list[Picture]], list[list[Picture]]]:
    """Return every other one of `sources`, each a list of pictures, and the rest; of a single source, of its pictures."""
    if len(sources) > 1:
        return sources[::2], sources[1::2]
    (pictures,) = sources
    return ([pictures[::2]], [pictures[1::2]]) if len(pictures) > 1 else (sources, sources)


def _check_at_least(least: int, name: str, value: int) -> None:
    if value < least:
        raise UserError(f"{name} is {value}: expected {least} or more; pass a larger number")


def _located(text: str, role: str) -> Path:
    path = Path(text)
    if not text or not path.exists():
        raise UserError(
            f"{role} path '{text}' does not exist: expected a folder of images or a .npy/.npz file; check the path"
        )
    if not path.is_dir() and path.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"{role} path '{text}' is neither a folder nor a .npy/.npz file: expected one of these; "
            f"put the images into a folder and pass the folder"
        )
    return path


def _names(folder: Path, role: str) -> list[str]:
    names = image_names(folder)
    if not names:
        content = "holds no image files" if any(folder.iterdir()) else "is empty"
        raise UserError(
            f"{role} folder '{folder}' {content}: expected files such as .jpg or .png in it or below it; "
            f"add images or pass another folder"
        )
    return names


def _candidates(
    path: Path, role: str, preprocessing: Preprocessing
) -> tuple[list[ImageCandidate], dict[str, int] | None]:
    """All candidates of `path`, and for the role "evaluation" the labels that its class folders give."""
    if not path.is_dir():
        array = array_from_file(path, preprocessing)
        labels = labels_from_file(path, len(array)) if role == "evaluation" else None
        return row_candidates(path, array), labels
    names = _names(path, role)
    labels = labels_from_names(path, names) if role == "evaluation" else None
    return file_candidates(path, names), labels


def _check_any_readable(path: Path, role: str, chosen: Chosen) -> None:
    if not chosen.pictures and chosen.unreadable:
        first = chosen.unreadable[0]
        raise UserError(
            f"{role} folder '{path}' holds no readable image, {len(chosen.unreadable)} failed to decode "
            f"(first '{first.name}', {' '.join(first.reason.split())}): expected files Pillow can open; "
            f"replace them"
        )


def _calibration_set(
    calib: str, preprocessing: Preprocessing, count: int, held_out: int, seed: int
) -> tuple[ImageSet, ImageSet]:
    """(calibration set, held-out set) of one folder or array; the second is empty if `held_out` is 0."""
    path = _located(calib, "calibration")
    candidates, _ = _candidates(path, "calibration", preprocessing)
    chosen = choose_pictures(in_random_order(candidates, seed), count + held_out)
    _check_any_readable(path, "calibration", chosen)
    found = len(chosen.pictures)
    if held_out and found < 2:
        raise UserError(
            f"calibration path '{calib}' holds {found} distinct readable image: expected at least 2, one to "
            f"calibrate and one held out to evaluate; add images or pass an evaluation folder"
        )
    held_out = min(held_out, max(1, found // 8, found - count))
    split = found - held_out
    source = f"{calib} ({len(candidates)} images, seed {seed})"
    skipped = tuple(each.name for each in chosen.unreadable)
    return (
        ImageSet(source, preprocessing, chosen.pictures[:split], skipped=skipped),
        ImageSet(f"{source}, held out", preprocessing, chosen.pictures[split:]),
    )


def _evaluation_set(
    evaluation: str, preprocessing: Preprocessing, wanted: int | None, seed: int, calibration: ImageSet
) -> ImageSet:
    """The images of `evaluation` (all, or `wanted` of them) that are not in `calibration`, with labels."""
    path = _located(evaluation, "evaluation")
    candidates, labels = _candidates(path, "evaluation", preprocessing)
    excluded = {picture.content for picture in calibration.pictures}
    chosen = choose_pictures(in_random_order(candidates, seed), wanted or len(candidates), excluded)
    if not chosen.overlap:
        _check_any_readable(path, "evaluation", chosen)
    if not chosen.pictures:
        raise UserError(
            f"evaluation path '{evaluation}' holds no image that is not also in the calibration set: "
            f"expected other images; pass another folder, or none to hold some of the calibration images out"
        )
    return ImageSet(
        f"{evaluation} ({len(candidates)} images, seed {seed})",
        preprocessing,
        chosen.pictures,
        skipped=tuple(each.name for each in chosen.unreadable),
        labels=None if labels is None else tuple(labels[picture.name] for picture in chosen.pictures),
        overlap=chosen.overlap,
    )


def _sample_set(
    role: str, photos: tuple[tuple[str, str], ...], preprocessing: Preprocessing, count: int, seed: int
) -> ImageSet:
    origin = f"{len(photos)} photographs of scikit-image and scikit-learn"
    source = f"sample {role} images: random crops of {origin}, seed {seed}"
    return ImageSet(source, preprocessing, random_crops(photos, count, seed), sample=True)


def image_sets(
    calib: str | None,
    evaluation: str | None,
    preprocessing: Preprocessing,
    count: int = 512,
    eval_count: int | None = None,
    seed: int = 0,
) -> tuple[ImageSet, ImageSet]:
    """(calibration set, evaluation set), which share no source image and hold no duplicates.

    calib: a folder (searched recursively), a .npy/.npz file, or None for crops of the built-in sample images.
    evaluation: a folder (subfolders are classes), a .npy/.npz file, or None to hold out images of `calib`.
    count, eval_count: the largest number of images in each set; None holds out 128, or takes all of `evaluation`.
    seed: decides which images are chosen, and their order.

    If there are fewer than count + eval_count images, one in eight of them, at least one, is held out. Raises
    `UserError` for a path or content that cannot be used, and for numbers out of range.
    """
    held_out = HELD_OUT if eval_count is None else eval_count
    _check_at_least(1, "image count", count)
    _check_at_least(1, "evaluation image count", held_out)
    _check_at_least(0, "seed", seed)
    if calib is None:
        calibration = _sample_set("calibration", CALIBRATION_PHOTOS, preprocessing, count, seed)
        if evaluation is None:
            return calibration, _sample_set("evaluation", EVALUATION_PHOTOS, preprocessing, held_out, seed)
    elif evaluation is None:
        return _calibration_set(calib, preprocessing, count, held_out, seed)
    else:
        calibration, _ = _calibration_set(calib, preprocessing, count, 0, seed)
    return calibration, _evaluation_set(evaluation, preprocessing, eval_count, seed, calibration)
