"""Samples of named arrays from a .npz file, for a network that reads anything else than one image.

An array has one entry per sample on its first axis; its name and type are those of an input of the network. `labels` (N,)
and `groups` (N,) may lie beside them, as beside images.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from calib.errors import UNREADABLE_ARRAYS, UserError
from calib.images.arrays import BESIDE
from calib.images.picture import ImageCandidate, Picture
from calib.inputs import DTYPES, Input, Inputs

LARGEST_WHOLE = 1 << 24  # a row is float32, which holds every whole number up to here
LARGEST_FLOAT = 65504  # FP16's: engines read floating inputs in it


def _loaded(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files if name not in BESIDE}
    except UNREADABLE_ARRAYS as error:
        raise UserError(
            f"array file '{path}' cannot be read ({' '.join(str(error).split())}): expected numeric arrays; write it again "
            f"with np.savez"
        ) from error


def _inputs(path: Path, arrays: Mapping[str, np.ndarray]) -> Inputs:
    if not arrays:
        raise UserError(f"array file '{path}' holds no arrays: expected one for every input of the network")
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES or not array.ndim or not array.size:
            raise UserError(
                f"array file '{path}' holds '{name}', {array.dtype} of shape {array.shape}: expected an input of the "
                f"network, {', '.join(DTYPES)}, one entry per sample on the first axis (of a network of images: give INPUT=)"
            )
    counts = {name: len(array) for name, array in arrays.items()}
    if len({*counts.values()}) > 1:
        raise UserError(
            f"array file '{path}' holds different numbers of samples "
            f"({', '.join(f'{name} {count}' for name, count in counts.items())}): expected one number"
        )
    return Inputs(tuple(Input(name, array.dtype.name, array.shape[1:]) for name, array in arrays.items()))


def inputs_from_file(path: Path) -> Inputs:
    """Return what the arrays of a .npz file are as inputs, in their order in the file.

    Raises UserError unless they are float32, int64, int32 or bool, of one number of samples.
    """
    return _inputs(path, _loaded(path))


def _require_values(path: Path, name: str, array: np.ndarray) -> None:
    """Raise UserError for what a row of float32 or an engine cannot hold."""
    floating = array.dtype == np.float32
    limit = LARGEST_FLOAT if floating else LARGEST_WHOLE
    wrong = ~((array <= limit) & (array >= -limit))  # NaN too
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0])
        raise UserError(
            f"array file '{path}' holds {array[at]} in row {at[0]} of '{name}': expected numbers from -{limit} to {limit}, "
            f"{'as FP16 holds' if floating else 'which are ids'}; remove the row or write the file again"
        )


def samples_from_file(path: Path, inputs: Inputs) -> dict[str, np.ndarray]:
    """Return the arrays of `inputs` (N, ...) by name, in their order.

    Raises UserError if the file holds others, or values that cannot be computed with.
    """
    arrays = _loaded(path)
    found = {one.name: one for one in _inputs(path, arrays).each}
    for one in inputs.each:
        if one.name not in found:
            raise UserError(
                f"array file '{path}' holds no '{one.name}': expected {inputs.described()}; there are {', '.join(found)}"
            )
        if found[one.name] != one:
            raise UserError(
                f"array file '{path}' holds {found[one.name].described()}: expected {one.described()}, as in CALIB="
            )
    if more := [name for name in found if name not in inputs.names]:
        raise UserError(f"array file '{path}' holds '{more[0]}' beside the inputs: expected {inputs.described()}")
    for name in inputs.names:
        _require_values(path, name, arrays[name])
    return {name: arrays[name] for name in inputs.names}


def _row(arrays: Mapping[str, np.ndarray], row: int) -> np.ndarray:
    """One sample as float32 (N,): its arrays one behind the other, flattened."""
    return np.concatenate([array[row].reshape(-1).astype(np.float32) for array in arrays.values()])


def _examined(arrays: Mapping[str, np.ndarray], row: int, group: str) -> Picture:
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name}\n".encode() + np.ascontiguousarray(array[row]).tobytes())
    return Picture(f"row {row}", digest.hexdigest(), lambda _inputs: _row(arrays, row), group=group)


def sample_candidates(arrays: Mapping[str, np.ndarray], groups: Sequence[str] | None = None) -> list[ImageCandidate]:
    """One candidate per sample of `arrays` (N, ...), of its group."""
    count = len(next(iter(arrays.values())))
    return [functools.partial(_examined, arrays, row, "" if groups is None else groups[row]) for row in range(count)]


def first_samples(arrays: Mapping[str, np.ndarray], count: int) -> np.ndarray:
    """Return the first `count` samples as rows float32 (count, N); of a file with fewer, some of them again."""
    have = len(next(iter(arrays.values())))
    return np.stack([_row(arrays, row % have) for row in range(count)])
