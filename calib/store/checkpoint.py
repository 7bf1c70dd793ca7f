"""What a long run has done so far, kept so that it goes on after an interruption.

A file is named after the sha256 of all that decides the run, so another run never finds it. It holds the sha256 of what
follows, then what torch saves: torch itself reads changed numbers without a word. One that is damaged is not used.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from calib.store.kept_files import replacing

DIGEST = hashlib.sha256().digest_size


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
        file = self.path.read_bytes()
        digest, content = file[:DIGEST], file[DIGEST:]
        if hashlib.sha256(content).digest() != digest:
            self.notes = (f"checkpoint '{self.path}' is damaged: begun anew",)
            return None
        self.notes = (f"went on from checkpoint '{self.path}'",)
        return torch.load(io.BytesIO(content), weights_only=True)

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep `state` in place of the one before, in one step. A place that cannot be written is no error."""
        if self.path is None:
            return
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        content = buffer.getvalue()
        try:
            with replacing(self.path) as fresh:
                fresh.write_bytes(hashlib.sha256(content).digest() + content)
        except OSError as error:
            self.notes = (f"not kept for interruptions: {self.path.parent} cannot be written ({error.strerror})",)
            self.path = None

    def remove(self) -> None:
        """The run is finished."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
