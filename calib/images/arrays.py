"""Images from a .npy or .npz file: float32 (N, 3, H, W), already preprocessed, or raw uint8 (N, H, W, 3).

A .npz file may hold `labels` (N,) and `groups` (N,) beside them.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from calib.errors import UNREADABLE_ARRAYS, UserError
from calib.images.picture import ImageCandidate, Picture
from calib.images.preprocess import Preprocessing, array_from_image

SUFFIXES = (".npy", ".npz")
PREFERRED_NAMES = ("images", "input")
BESIDE = ("labels", "groups")  # what a file may say about its images
EXAMINED_ROWS = 16  # that tell whether an array holds pixels
LARGEST_PIXEL = 255.0


def _extra(path: Path, name: str) -> np.ndarray | None:
    """Return the array `name` of a .npz file; None without one, or for another file."""
    if path.suffix.lower() != ".npz":
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name] if name in arrays.files else None
    except UNREADABLE_ARRAYS as error:
        raise UserError(
            f"array file '{path}' holds {name} that cannot be read ({' '.join(str(error).split())}): expected numbers"
        ) from error


def _only_array(path: Path, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    names = [name for name in arrays if name not in BESIDE]
    wanted = names if len(names) == 1 else [name for name in PREFERRED_NAMES if name in names]
    if len(wanted) != 1:
        raise UserError(
            f"array file '{path}' holds the arrays {', '.join(names) or '(none)'}: expected a single array "
            f"or one named images or input; save it with np.savez(path, images=...), or for a network that takes these "
            f"arrays give no INPUT="
        )
    return arrays[wanted[0]]


def _loaded(path: Path) -> np.ndarray:
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            return _only_array(path, loaded)
    except UNREADABLE_ARRAYS as error:
        raise UserError(
            f"array file '{path}' cannot be read ({' '.join(str(error).split())}): expected a numeric array; "
            f"write it again with np.save"
        ) from error


def array_from_file(path: Path, preprocessing: Preprocessing) -> np.ndarray:
    """The array of a .npy file, memory-mapped, or of a .npz file, in memory.

    Raises `UserError` for an unreadable file, ambiguous names, or a shape or dtype other than float32
    (N, 3, height, width) and uint8 (N, H, W, 3) with N of 1 or more.
    """
    array = _loaded(path)
    size = (3, preprocessing.height, preprocessing.width)
    preprocessed = array.dtype == np.float32 and array.shape[1:] == size
    raw = array.dtype == np.uint8 and array.ndim == 4 and array.shape[3] == 3
    if not (preprocessed or raw) or 0 in array.shape:
        raise UserError(
            f"array file '{path}' holds {array.dtype} of shape {array.shape}: expected float32 "
            f"(N, {', '.join(map(str, size))}), preprocessed, or uint8 (N, H, W, 3), raw RGB; "
            f"convert and save it again"
        )
    if preprocessed:
        _check_normalised(path, array, preprocessing)
    return array


def labels_from_file(path: Path, rows: int) -> dict[str, int] | None:
    """Return the class index of every row by the row's name, from the array `labels` of a .npz file; None without one.

    Raises `UserError` unless it holds one whole number of at least 0 per row.
    """
    labels = _extra(path, "labels")
    if labels is None:
        return None
    if labels.shape != (rows,) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise UserError(
            f"array file '{path}' holds labels of {labels.dtype} and shape {labels.shape}: expected {rows} class indices, "
            f"whole numbers of at least 0"
        )
    return {f"row {row}": int(label) for row, label in enumerate(labels)}


def groups_from_file(path: Path, rows: int) -> list[str] | None:
    """Return what every row has in common with others of its source, from the array `groups` of a .npz file; None without.

    A group is the same in every file, so that images to judge on share none with those to calibrate on. Raises `UserError`
    unless it holds one whole number or text per row.
    """
    groups = _extra(path, "groups")
    if groups is None:
        return None
    if groups.shape != (rows,) or groups.dtype.kind not in "iuU":
        raise UserError(
            f"array file '{path}' holds groups of {groups.dtype} and shape {groups.shape}: expected {rows} whole numbers or "
            f"texts, the same for rows that show one source"
        )
    return [f"group {group}" for group in groups.tolist()]


def _check_normalised(path: Path, array: np.ndarray, preprocessing: Preprocessing) -> None:
    """Raise `UserError` for pixel values that nobody has normalised: none is negative, though a mean is subtracted."""
    some = array[:: -(-len(array) // EXAMINED_ROWS)]
    low, high = float(np.min(some)), float(np.max(some))
    if low >= 0 and 0 < high <= LARGEST_PIXEL and min(preprocessing.mean) > 0.1:
        raise UserError(
            f"array file '{path}' holds values {low:g} to {high:g}, none of them negative: they look like pixels, not like "
            f"images normalised by mean {preprocessing.mean} and std {preprocessing.std} of pixels in 0..1; normalise them, "
            f"or save raw pixels as uint8 (N, H, W, 3)"
        )


def _read_row(array: np.ndarray, row: int, preprocessing: Preprocessing) -> np.ndarray:
    if array.dtype == np.uint8:
        return array_from_image(Image.fromarray(np.ascontiguousarray(array[row])), preprocessing)
    return np.array(array[row])


def _examined(path: Path, array: np.ndarray, row: int, group: str) -> Picture:
    values = np.ascontiguousarray(array[row])
    if array.dtype == np.float32 and not np.isfinite(values).all():
        raise UserError(
            f"array file '{path}' holds NaN or infinity in row {row}: expected finite numbers; "
            f"remove the row or write the file again"
        )
    content = hashlib.sha256(values.data).hexdigest()
    return Picture(f"row {row}", content, functools.partial(_read_row, array, row), group=group)


def row_candidates(path: Path, array: np.ndarray, groups: Sequence[str] | None = None) -> list[ImageCandidate]:
    """One candidate per row of `array`, of its group; examining it raises `UserError` for NaN or infinity."""
    return [
        functools.partial(_examined, path, array, row, "" if groups is None else groups[row])
        for row in range(len(array))
    ]
