"""Reads the tensors of a checkpoint file, whatever its name: safetensors, or what torch.save wrote.

Nothing in a file runs: torch's unpickler is limited to tensors, plain values and the classes that `_harmless` lists.
"""

import argparse
import re
import zipfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    StateDict = dict[str, Tensor]

# Averaged weights first: they are the ones a training run reports.
WRAPPERS = (
    "state_dict_ema", "model_ema", "ema", "ema_state_dict", "state_dict", "model_state_dict", "model", "net", "module",
    "params_ema", "params",
)  # fmt: skip
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # that wrappers put before every name
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
    kinds = [type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")]
    return [
        argparse.Namespace, defaultdict, dict, set, np.dtype, *kinds,
        (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"),
    ]  # fmt: skip


def _is_safetensors(path: Path) -> bool:
    """Whether the file begins like safetensors: the length of a JSON header in 8 bytes, then the header."""
    with path.open("rb") as file:
        start = file.read(9)
    return path.suffix == ".safetensors" or (len(start) == 9 and start[8:] == b"{" and start[5:8] == b"\0\0\0")


def _other_kind(path: Path) -> str | None:
    """Return what a file is that holds no state dict; None if it may."""
    if path.suffix.lower() == ".onnx":
        return "an ONNX file"
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
                f"{path} is {kind}, not a checkpoint of weights: save the state_dict of the network instead."
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


def _unwrapped(content: Any, path: Path) -> tuple["StateDict", str]:
    """Return (the tensors inside a checkpoint, a note that names its entries)."""
    import torch

    note = ""
    while not _tensors(content):
        if not isinstance(content, Mapping):
            kind = type(content).__name__
            raise UserError(f"{path} holds a {kind}, expected a state dict: re-save it as .safetensors.")
        inner = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping) and len(content[key]) > 0), None)
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
    """Return (the part of `state` under a prefix, if that is all of the network, a note on what is left out)."""
    needed = {key for key in expected if is_read(key)}
    for prefix in PREFIXES:
        part = {key: value for key, value in state.items() if key.startswith(prefix)}
        if len(part) < len(state) and needed <= {key.removeprefix(prefix) for key in part}:
            return part, f" (left out: {first_few(key for key in state if key not in part)})"
    return state, ""


def without_prefixes(state: "StateDict", expected: Collection[str]) -> tuple["StateDict", str]:
    """Return (`state` without what wrappers put before every name, a note on it).

    A prefix that the names `expected` have as well stays. What a training loop keeps beside a whole network under a prefix,
    such as the weights of a loss, is left out.
    """
    taken = ""
    state, left_out = _inner(state, expected)
    while state:
        prefix = next((each for each in PREFIXES if all(key.startswith(each) for key in state)), None)
        if prefix is None or all(key.startswith(prefix) for key in expected):
            break
        state, taken = {key.removeprefix(prefix): value for key, value in state.items()}, taken + prefix
    return state, (f" (without '{taken}')" if taken else "") + left_out


def read_state(path: Path, expected: Collection[str]) -> tuple["StateDict", str]:
    """Return (the tensors in the file at `path` by name, a note on where in it they lay).

    `expected`: the names that the network has. Raises UserError if the file cannot be read or holds no state dict.
    """
    state, note = _unwrapped(_content(path), path)
    state, prefixes = without_prefixes(state, expected)
    return state, note + prefixes
