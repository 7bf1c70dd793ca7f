"""What a long run has done so far, kept so that it goes on after an interruption.

A file is named after the sha256 of all that decides the run, so another run never finds it. It holds the sha256 of what
follows, then what torch saves: torch itself reads changed numbers without a word. One that is damaged is not used.
"""

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from calib.store.kept_files import replacing

DIGEST = hashlib.sha256().digest_size


class UnusableError(Exception):
    """Why a file is not used, in words that follow "is"."""


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Keep `state` at `path` in place of what is there, in one step. Raises OSError."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    content = buffer.getvalue()
    with replacing(path) as fresh:
        fresh.write_bytes(hashlib.sha256(content).digest() + content)


def read_state(path: Path, classes: Sequence[type] = (), device: torch.device | None = None) -> dict[str, Any]:
    """What `write_state` wrote: tensors (on `device`, if given), plain values and objects of `classes`.

    Raises UnusableError for anything else.

    No code that a file carries runs: torch builds objects of the named classes alone.
    """
    try:
        file = path.read_bytes()
    except OSError as error:
        raise UnusableError(f"damaged ({error.strerror})") from error
    digest, content = file[:DIGEST], file[DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        raise UnusableError("damaged")
    try:
        with torch.serialization.safe_globals([*classes]):
            state = torch.load(io.BytesIO(content), weights_only=True, map_location=device)
    except Exception as error:  # the digest is no signature, and a foreign pickle fails in many ways
        foreign = re.search(r"GLOBAL (\S+)", str(error))  # torch's own advice is to read the file without this guard
        raise UnusableError("no state of this tool" + (f" (it holds {foreign[1]})" if foreign else "")) from error
    if not isinstance(state, dict):
        raise UnusableError(f"no state of this tool (it holds {type(state).__name__})")
    return state


class Checkpoint:
    """The state of one run. `path` None: nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.notes: tuple[str, ...] = ()  # what to tell the user in the end

    @classmethod
    def of(cls, folder: Path, stage: str, run: Mapping[str, Any]) -> "Checkpoint":
        """In `folder`, under what decides the run: `run` holds JSON values."""
        key = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
        return cls(folder / f"{stage}.{key}.pt")

    def load(self) -> dict[str, Any] | None:
        """The state kept last, None if there is none."""
        if self.path is None or not self.path.exists():
            return None
        try:
            state = read_state(self.path)
        except UnusableError as reason:
            self.notes = (f"checkpoint '{self.path}' is {reason}: begun anew",)
            return None
        self.notes = (f"went on from checkpoint '{self.path}'",)
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep `state` in place of the one before, in one step. A place that cannot be written is no error."""
        if self.path is None:
            return
        try:
            write_state(self.path, state)
        except OSError as error:
            self.notes = (f"not kept for interruptions: {self.path.parent} cannot be written ({error.strerror})",)
            self.path = None

    def remove(self) -> None:
        """The run is finished."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
