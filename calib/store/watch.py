"""Who follows a long stage: is told how far it is, and keeps what an interruption would lose."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib.store.checkpoint import Checkpoint
from calib.store.provenance import made_by


def _nobody(done: int, total: int) -> None:
    """Steps done, of how many."""


@dataclass(frozen=True)
class Watch:
    """`at` is called after every step; `folder` takes checkpoints, None for no checkpoints."""

    at: Callable[[int, int], None] = _nobody
    folder: Path | None = None

    def checkpoint(self, stage: str, run: Callable[[], Mapping[str, Any]]) -> Checkpoint:
        """Of the run that the JSON values of `run()` describe, made by this code."""
        return Checkpoint.of(self.folder, stage, {**run(), "made_by": made_by()}) if self.folder else Checkpoint(None)


UNWATCHED = Watch()
