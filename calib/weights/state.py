"""Reads the tensors of a checkpoint file, whatever its name: safetensors, or what torch.save wrote.

Nothing in a file runs: torch's unpickler is limited to tensors, plain values and the classes that `_harmless` lists.
"""

import argparse
import re
import zipfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from datetime import datetime, timedelta
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from calib.errors import UserError
from calib.weights.own import NO_CODE

if TYPE_CHECKING:
    from torch import Tensor

    StateDict = dict[str, Tensor]

# Averaged weights first: they are the ones a training run reports.
WRAPPERS = (
    "state_dict_ema", "model_ema", "ema", "ema_state_dict", "state_dict", "model_state_dict", "model", "net", "module",
    "params_ema", "params",
)  # fmt: skip
PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")
COUNTERS = ("n_averaged", "num_updates", "decay")  # that wrappers keep beside the weights


def first_few(items: Iterable[str], limit: int = 3) -> str:
    """Return the first items as text, and how many more there are."""
    items = list(items)
    rest = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + rest


def is_read(key: str) -> bool:
    """Whether inference reads the entry: not a counter that only training reads and torch before 0.4.1 did not save."""
    return not key.endswith("num_batches_tracked")


def _harmless() -> list[Any]:
    """Classes that checkpoints of training scripts hold beside tensors, none of which runs code when it is read."""
    import numpy as np

    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    array = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    kinds = [
        type(np.dtype(kind)) for kind in ("float64", "float32", "float16", "int64", "int32", "uint8", "bool", "str")
    ]
    renamed = {
        "numpy.core.multiarray.scalar": scalar, "numpy._core.multiarray.scalar": scalar,
        "numpy.core.multiarray._reconstruct": array, "numpy._core.multiarray._reconstruct": array,
        # a path of another system cannot be made here, and none is needed
        **{f"{module}.{kind}": PurePath for module in ("pathlib", "pathlib._local") for kind in PATHS},
    }  # fmt: skip
    return [
        argparse.Namespace, SimpleNamespace, defaultdict, dict, set, datetime, timedelta, np.dtype, np.ndarray, *kinds,
        *((made, name) for name, made in renamed.items()),
    ]  # fmt: skip


def _is_safetensors(path: Path) -> bool:
    """Whether the file begins like safetensors: the length of a JSON header in 8 bytes, then the header."""
    with path.open("rb") as file:
        start = file.read(9)
    return path.suffix == ".safetensors" or (len(start) == 9 and start[8:] == b"{" and start[5:8] == b"\0\0\0")


def _other_kind(path: Path) -> str | None:
    """Return what a file is that holds no state dict; None if it may."""
    if path.name.endswith(".index.json"):
        return "the index of a checkpoint in several files"
    kind = NO_CODE.get(path.suffix.lower())
    if kind and not kind.endswith("weights"):
        return kind
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any("/code/" in name for name in archive.namelist()):
                return "a TorchScript file"
    return None


def _torch_content(path: Path) -> Any:
    import torch

    try:
        with torch.serialization.safe_globals(_harmless()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no pickle make the unpickler raise anything
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found and not found[1].startswith("torch."):
            raise UserError(
                f"{path} holds an object of {found[1]}, which is refused because reading it could run code: re-save the "
                f"weights alone, torch.save(net.state_dict(), 'weights.pth')."
            ) from error
        raise UserError(
            f"{path} cannot be read as a torch checkpoint of plain tensors (truncated, of another kind, or it holds "
            "pickled objects, which are refused because they can run code): copy it again, or re-save its state_dict "
            "as .safetensors."
        ) from error


def _content(path: Path) -> Any:
    import safetensors
    import safetensors.torch

    if not path.stat().st_size:
        raise UserError(f"{path} is empty (truncated to 0 bytes): copy it again.")
    if not _is_safetensors(path):
        if kind := _other_kind(path):
            raise UserError(
                f"{path} is {kind}, not a checkpoint of weights: give what torch.save(net.state_dict(), 'weights.pth') "
                f"writes for the PyTorch network it was made from, with MODEL= or MODULE=."
            )
        return _torch_content(path)
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): copy it again.") from error


def _tensors(content: Any) -> bool:
    """Whether `content` maps names to tensors, counters apart, and is not empty."""
    import torch

    if not isinstance(content, Mapping):
        return False
    named = [(key, value) for key, value in content.items() if key not in COUNTERS]
    return bool(named) and all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in named)


def _entry(content: Mapping[Any, Any], path: Path, expected: Collection[str]) -> Any:
    """Return the key of the entry that holds the weights: one of WRAPPERS, else the only one of named tensors.

    Of several, the one with all the names `expected`. None if there is no such entry; raises UserError for a choice.
    """
    filled = [key for key, value in content.items() if isinstance(value, Mapping) and _weights(value)]
    known = next((key for key in WRAPPERS if key in filled), None)
    if known is not None:
        return known
    found = [key for key in filled if _tensors(content[key])]
    if len(found) > 1:
        found = [key for key in found if _holds(without_prefixes(content[key], expected)[0], expected)] or found
    if len(found) > 1:
        raise UserError(
            f"{path} holds several state dicts, {first_few(map(str, found))}: save the one that you mean, "
            f"torch.save(content[{found[0]!r}], 'weights.pth')."
        )
    return next(iter(found), None)


def _weights(content: Mapping[Any, Any]) -> bool:
    """Whether `content` holds anything but counters of a wrapper."""
    return any(str(key).rpartition(".")[2] not in COUNTERS for key in content)


def _holds(state: Collection[str], expected: Collection[str]) -> bool:
    """Whether `state` has all of the names `expected` that inference reads."""
    return all(key in state for key in expected if is_read(key))


def _unwrapped(content: Any, path: Path, expected: Collection[str]) -> tuple["StateDict", str]:
    """Return (the tensors inside a checkpoint, a note that names its entries)."""
    import torch

    note = ""
    while not _tensors(content):
        if not isinstance(content, Mapping):
            kind = type(content).__name__
            raise UserError(f"{path} holds a {kind}, expected a state dict: re-save it as .safetensors.")
        inner = _entry(content, path, expected)
        if inner is None:
            others = [
                str(key)
                for key, value in content.items()
                if not (isinstance(key, str) and isinstance(value, torch.Tensor))
            ]
            if not others:
                break
            raise UserError(
                f"{path} is no state dict: {first_few(others)} hold no tensors; expected tensors by parameter "
                f"name, bare or under one of {', '.join(WRAPPERS)}."
            )
        content, note = content[inner], f"{note} [{inner}]"
    return {key: value for key, value in content.items() if key not in COUNTERS}, note


def _inner(state: "StateDict", expected: Collection[str]) -> tuple["StateDict", str]:
    """Return (the part of `state` that has all of the network, if it is the only one, a note on the rest).

    That is the part under a prefix, or what has no prefix beside a second network under one, such as a teacher.
    """
    first = next((key for key in expected if is_read(key)), "")
    prefixes = [key.removesuffix(first) for key in state if first and key.endswith(f".{first}")]
    parts = [{key: value for key, value in state.items() if key.startswith(prefix)} for prefix in prefixes]
    whole = [
        part
        for prefix, part in zip(prefixes, parts, strict=True)
        if _holds({key.removeprefix(prefix) for key in part}, expected)
    ]
    if whole and _holds({*state}, expected):
        others = {key for part in whole for key in part}
        whole = [{key: value for key, value in state.items() if key not in others}]
    if len(whole) != 1 or len(whole[0]) == len(state):
        return state, ""
    return whole[0], f" (left out: {first_few(key for key in state if key not in whole[0])})"


def without_prefixes(state: "StateDict", expected: Collection[str]) -> tuple["StateDict", str]:
    """Return (`state` without what wrappers put before every name, a note on it).

    A prefix is a first part that all names share and that no name of `expected` begins with. What a training loop keeps
    beside a whole network under a prefix, such as the weights of a loss, is left out.
    """
    taken = ""
    state, left_out = _inner(state, expected)
    while state:
        prefix = next(iter(state)).partition(".")[0] + "."
        if not all(key.startswith(prefix) for key in state) or any(key.startswith(prefix) for key in expected):
            break
        state, taken = {key.removeprefix(prefix): value for key, value in state.items()}, taken + prefix
    return state, (f" (without '{taken}')" if taken else "") + left_out


def read_state(path: Path, expected: Collection[str]) -> tuple["StateDict", str]:
    """Return (the tensors in the file at `path` by name, a note on where in it they lay).

    `expected`: the names that the network has. Raises UserError if the file cannot be read or holds no state dict.
    """
    state, note = _unwrapped(_content(path), path, expected)
    state, prefixes = without_prefixes(state, expected)
    return state, note + prefixes
