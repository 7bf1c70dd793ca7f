"""Training that was interrupted goes on: one file per run, whole or absent, refused where it belongs to another run.

A file is the sha256 of what follows, then what torch saves: torch itself reads changed numbers without a word.
"""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from calib.errors import UserError
from calib.kept_files import replacing

DIGEST = hashlib.sha256().digest_size


def save_checkpoint(path: Path, run: Mapping[str, Any], state: dict[str, Any]) -> None:
    """Write `state` of the run that the JSON values `run` describe, in one step. Raises OSError."""
    buffer = io.BytesIO()
    torch.save({"run": dict(run), "state": state}, buffer)
    content = buffer.getvalue()
    with replacing(path) as fresh:
        fresh.write_bytes(hashlib.sha256(content).digest() + content)


def load_checkpoint(path: Path, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state kept for `run`, None if there is no file. Raises UserError for a file of another run or a damaged one."""
    if not path.exists():
        return None
    file = path.read_bytes()
    digest, content = file[:DIGEST], file[DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        raise UserError(f"checkpoint '{path}' is damaged or no checkpoint of this tool: delete it or pass another path")
    found = torch.load(io.BytesIO(content), weights_only=True)
    kept = found["run"]
    if other := [name for name in run if kept.get(name) != run[name]]:
        raise UserError(
            f"checkpoint '{path}' belongs to another run (other {', '.join(other)}): expected one of this model, "
            f"these images and these options; delete it to start anew, or pass another path"
        )
    return found["state"]
