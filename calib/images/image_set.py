"""Streaming image sets: the calibration images, and the evaluation images that the result is judged on.

The two sets share no source image, so an error measured on the second set holds for new images.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np

from calib.errors import UserError
from calib.images.arrays import SUFFIXES, array_from_file, groups_from_file, labels_from_file, row_candidates
from calib.images.folder import Listing, file_candidates, labels_from_names, listed
from calib.images.picture import THREADS, Chosen, ImageCandidate, Picture, choose_pictures, in_random_order
from calib.images.preprocess import Preprocessing
from calib.images.sample_photos import CALIBRATION_PHOTOS, EVALUATION_PHOTOS, random_crops
from calib.images.samples import sample_candidates, samples_from_file
from calib.inputs import Inputs

Reading = Preprocessing | Inputs  # how images are prepared, or which named arrays a sample consists of
HELD_OUT = 128  # images kept for evaluation when no number is asked for


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order. They are read again at each iteration and are never all in memory.

    Where `preprocessing` is the `Inputs` of a network, they are samples of named arrays, each as one row of values.
    """

    source: str  # where the images come from, for the report
    preprocessing: Reading
    pictures: tuple[Picture, ...]
    sample: bool = False  # True: crops of the built-in sample images, not for production
    skipped: tuple[str, ...] = ()  # unreadable files found while choosing (none in a held-out set)
    other_pictures: tuple[str, ...] = ()  # pictures of kinds that Pillow does not read (none in a held-out set)
    duplicates: int = 0  # files left out because an earlier one has the same content (0 in a held-out set)
    labels: tuple[int, ...] | None = None  # class index of each image
    overlap: int = 0  # evaluation images left out because their content or group is in the calibration set
    too_many: int = 0  # images left out because the outputs of more would not fit into memory

    @property
    def count(self) -> int:
        """The number of images."""
        return len(self.pictures)

    @property
    def kind(self) -> str:
        """What they are, in one word."""
        return "samples" if isinstance(self.preprocessing, Inputs) else "images"

    def left_out(self) -> list[str]:
        """Sentences on files that are not in the set though they may have been meant to be."""
        found = []
        if self.skipped:
            found.append(f"{len(self.skipped)} unreadable images skipped: {', '.join(self.skipped[:3])}")
        if self.other_pictures:
            some = ", ".join(self.other_pictures[:3])
            found.append(f"{len(self.other_pictures)} pictures of kinds that cannot be read, convert them: {some}")
        if self.duplicates:
            found.append(f"{self.duplicates} duplicates left out: the same content as another image")
        if self.too_many:
            found.append(f"{self.too_many} left out: the outputs of so many {self.kind} would not fit into memory")
        return found

    @property
    def sha256(self) -> str:
        """Hex sha256 of the preprocessing and of the contents, windows and groups of all images, in order."""
        digest = hashlib.sha256(json.dumps(self.preprocessing.to_json(), sort_keys=True).encode())
        for picture in self.pictures:
            digest.update(f"\n{picture.content} {picture.window}{picture.group}".encode())
        return digest.hexdigest()

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """Yield batches float32 (batch_size, 3, H, W) in the order of the set, of samples (batch_size, N).

        The last one may be smaller.

        Raises `UserError` for a batch size below 1, and for a file that vanished or changed since it was chosen.
        """
        _check_at_least(1, "batch size", batch_size)
        with ThreadPoolExecutor(THREADS) as pool:
            for start in range(0, self.count, batch_size):
                chunk = self.pictures[start : start + batch_size]
                yield np.stack(list(pool.map(lambda picture: picture.read(self.preprocessing), chunk)))

    @property
    def sources(self) -> tuple[int, ...]:
        """Number of the source image of every picture; crops of one image, and pictures of one group, have the same."""
        numbers: dict[str, int] = {}
        return tuple(numbers.setdefault(picture.source, len(numbers)) for picture in self.pictures)

    def halves(self) -> tuple[tuple["ImageSet", "ImageSet"], tuple["ImageSet", "ImageSet"]]:
        """Return two halves without a common source image, each in two parts without a common source image.

        With fewer than four source images, parts share some of them; a set of one or two pictures repeats them.
        """
        by_source: dict[str, list[Picture]] = {}
        for picture in self.pictures:
            by_source.setdefault(picture.source, []).append(picture)
        first, second = (_dealt(half) for half in _dealt([by_source[source] for source in sorted(by_source)]))
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


def _listed(folder: Path, role: str) -> Listing:
    found = listed(folder)
    if not found.images:
        content = "holds no image files" if any(folder.iterdir()) else "is empty"
        if found.other_pictures:
            kinds = ", ".join(sorted({Path(name).suffix.lower() for name in found.other_pictures}))
            content = f"holds {len(found.other_pictures)} pictures of kinds that cannot be read ({kinds})"
        raise UserError(
            f"{role} folder '{folder}' {content}: expected files such as .jpg or .png in it or below it; "
            f"add or convert images, or pass another folder"
        )
    return found


@dataclass(frozen=True)
class _Found:
    """What lies at a path: images to choose from, and for the role "evaluation" the labels that the path gives."""

    candidates: list[ImageCandidate]
    described: str  # how many there are and what counts as one source image
    labels: dict[str, int] | None
    other_pictures: tuple[str, ...] = ()


def _found_samples(path: Path, role: str, inputs: Inputs) -> _Found:
    if path.suffix.lower() != ".npz":
        raise UserError(
            f"{role} path '{path}': expected a .npz file with an array for every input ({inputs.described()})"
        )
    arrays = samples_from_file(path, inputs)
    count = len(next(iter(arrays.values())))
    labels = labels_from_file(path, count) if role == "evaluation" else None
    groups = groups_from_file(path, count)
    kinds = "each taken for a source of its own" if groups is None else f"{len(set(groups))} groups"
    return _Found(sample_candidates(arrays, groups), f"{count} samples, {kinds}", labels)


def _found(path: Path, role: str, preprocessing: Reading) -> _Found:
    if isinstance(preprocessing, Inputs):
        return _found_samples(path, role, preprocessing)
    if path.is_dir():
        listing = _listed(path, role)
        names = listing.images
        labels = labels_from_names(path, names) if role == "evaluation" else None
        return _Found(file_candidates(path, names), f"{len(names)} images", labels, listing.other_pictures)
    array = array_from_file(path, preprocessing)
    labels = labels_from_file(path, len(array)) if role == "evaluation" else None
    groups = groups_from_file(path, len(array))
    kinds = "each taken for a source image of its own" if groups is None else f"{len(set(groups))} groups"
    return _Found(row_candidates(path, array, groups), f"{len(array)} rows, {kinds}", labels)


def _check_any_readable(path: Path, role: str, chosen: Chosen) -> None:
    if not chosen.pictures and chosen.unreadable:
        first = chosen.unreadable[0]
        raise UserError(
            f"{role} folder '{path}' holds no readable image, {len(chosen.unreadable)} failed to decode "
            f"(first '{first.name}', {' '.join(first.reason.split())}): expected files Pillow can open; "
            f"replace them"
        )


def _calibration_set(
    calib: str, preprocessing: Reading, count: int, held_out: int, seed: int
) -> tuple[ImageSet, ImageSet]:
    """(calibration set, held-out set) of one folder or array; the second is empty if `held_out` is 0."""
    path = _located(calib, "calibration")
    found = _found(path, "calibration", preprocessing)
    chosen = choose_pictures(in_random_order(found.candidates, seed), count + held_out)
    _check_any_readable(path, "calibration", chosen)
    pictures, distinct = chosen.pictures, len(chosen.pictures)
    if held_out and len({picture.source for picture in pictures}) < 2:
        what = "distinct readable image" if distinct < 2 else "readable images of one group"
        raise UserError(
            f"calibration path '{calib}' holds {distinct} {what}: expected at least 2 source images, one to "
            f"calibrate and one held out to evaluate; add images or pass an evaluation folder"
        )
    held_out = min(held_out, max(1, distinct // 8, distinct - count))
    fitted, judged = _split(pictures, distinct - held_out)
    source = f"{calib} ({found.described}, seed {seed})"
    skipped = tuple(each.name for each in chosen.unreadable)
    return (
        ImageSet(
            source, preprocessing, fitted, skipped=skipped, other_pictures=found.other_pictures,
            duplicates=chosen.duplicates,
        ),
        ImageSet(f"{source}, held out", preprocessing, judged),
    )  # fmt: skip


def _split(pictures: tuple[Picture, ...], first: int) -> tuple[tuple[Picture, ...], tuple[Picture, ...]]:
    """Return about `first` of `pictures` and the rest, without a common source; of two sources or more neither is empty."""
    sources = list(dict.fromkeys(picture.source for picture in pictures))
    if first >= len(pictures):
        return pictures, ()
    counts = Counter(picture.source for picture in pictures)
    taken = {sources[0]}
    for source in sources[1:-1]:
        if sum(counts[each] for each in taken) + counts[source] <= first:
            taken.add(source)
    fitted = tuple(picture for picture in pictures if picture.source in taken)
    return fitted, tuple(picture for picture in pictures if picture.source not in taken)


def _evaluation_set(
    evaluation: str, preprocessing: Reading, wanted: int | None, seed: int, calibration: ImageSet
) -> ImageSet:
    """The images of `evaluation` (all, or `wanted` of them) that are not in `calibration`, with labels."""
    path = _located(evaluation, "evaluation")
    found = _found(path, "evaluation", preprocessing)
    excluded = {each for picture in calibration.pictures for each in (picture.content, picture.source)}
    chosen = choose_pictures(in_random_order(found.candidates, seed), wanted or len(found.candidates), excluded)
    if not chosen.overlap:
        _check_any_readable(path, "evaluation", chosen)
    if not chosen.pictures:
        raise UserError(
            f"evaluation path '{evaluation}' holds no image that is not also in the calibration set: "
            f"expected other images; pass another folder, or none to hold some of the calibration images out"
        )
    return ImageSet(
        f"{evaluation} ({found.described}, seed {seed})",
        preprocessing,
        chosen.pictures,
        skipped=tuple(each.name for each in chosen.unreadable),
        other_pictures=found.other_pictures,
        duplicates=chosen.duplicates,
        labels=None if found.labels is None else tuple(found.labels[picture.name] for picture in chosen.pictures),
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
    preprocessing: Reading,
    count: int = 512,
    eval_count: int | None = None,
    seed: int = 0,
) -> tuple[ImageSet, ImageSet]:
    """(calibration set, evaluation set), which share no source image (or group) and hold no duplicates.

    calib: a folder (searched recursively), a .npy/.npz file, or None for crops of the built-in sample images; of a network
    with named inputs a .npz file.
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
        if isinstance(preprocessing, Inputs):
            raise UserError(f"expected CALIB=, a .npz file with an array for every input ({preprocessing.described()})")
        calibration = _sample_set("calibration", CALIBRATION_PHOTOS, preprocessing, count, seed)
        if evaluation is None:
            return calibration, _sample_set("evaluation", EVALUATION_PHOTOS, preprocessing, held_out, seed)
    elif evaluation is None:
        return _calibration_set(calib, preprocessing, count, held_out, seed)
    else:
        calibration, _ = _calibration_set(calib, preprocessing, count, 0, seed)
    return calibration, _evaluation_set(evaluation, preprocessing, eval_count, seed, calibration)
