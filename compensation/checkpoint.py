"""Training that was interrupted goes on: one file per run, whole or absent, refused where it belongs to another run."""

import hashlib
import os
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib.errors import UserError


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hex digest of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(path: Path, run: Mapping[str, Any], state: dict[str, Any]) -> None:
    """Write `state` of the run that the JSON values `run` describe, in one step. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the rename stays on one file system and is atomic.
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        fresh = Path(scratch) / path.name
        with fresh.open("wb") as file:
            torch.save({"run": dict(run), "state": state}, file)
            file.flush()
            os.fsync(file.fileno())  # a rename may reach the disk before the content does
        fresh.replace(path)


def load_checkpoint(path: Path, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state kept for `run`, None if there is no file. Raises UserError for a file of another run or a damaged one."""
    if not path.exists():
        return None
    try:
        content = torch.load(path, weights_only=True)
        kept, state = content["run"], content["state"]
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError) as error:
        raise UserError(
            f"checkpoint '{path}' cannot be read ({' '.join(str(error).split())[:80]}): expected a file this stage "
            f"wrote; delete it to start anew"
        ) from error
    if other := [name for name in run if kept.get(name) != run[name]]:
        raise UserError(
            f"checkpoint '{path}' belongs to another run (other {', '.join(other)}): expected one of this model, "
            f"these images and these options; delete it to start anew, or pass another path"
        )
    return state
