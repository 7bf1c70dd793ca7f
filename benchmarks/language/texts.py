"""Texts as token ids: those that calibrate, and those that judge."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from calib.errors import UNREADABLE_ARRAYS, UserError
from calib.images.batches import Half, Part

LEAST = 10  # texts: two judge, eight calibrate, two in each part of each half
JUDGED = 5  # one of so many texts judges, the last ones of the file: neighbours are often from one document
BATCH = 4  # texts per forward pass


@dataclass(frozen=True)
class Texts:
    """Token ids, int64 (N, T), in the order of the file."""

    ids: np.ndarray

    @property
    def tokens(self) -> int:
        """Tokens of each text, T."""
        return int(self.ids.shape[1])

    @property
    def judged(self) -> np.ndarray:
        """Texts that judge and nothing else, (M, T): the last fifth."""
        return self.ids[-(len(self.ids) // JUDGED) :]

    @property
    def calibrating(self) -> np.ndarray:
        """All other texts."""
        return self.ids[: -(len(self.ids) // JUDGED)]

    def halves(self, device: torch.device) -> tuple[Half, Half]:
        """Return the calibration texts by their roles, as rows (N, T) float32 in batches on `device`."""
        first, second, third, fourth = (
            Part(rows(each, device).split(BATCH)) for each in np.array_split(self.calibrating, 4)
        )
        return Half((first, second)), Half((third, fourth))

    def require_known(self, vocabulary: int) -> None:
        """Raise UserError for an id beyond those of a network that knows `vocabulary` tokens."""
        if self.ids.max() >= vocabulary:
            raise UserError(
                f"--ids holds the id {self.ids.max()}: expected ids from 0 to {vocabulary - 1}, the network's"
            )


def rows(ids: np.ndarray, device: torch.device) -> Tensor:
    """Return `ids` (N, T) as rows that stand for named inputs (calib/input_rows.py), float32."""
    return torch.from_numpy(ids.astype(np.float32)).to(device)


def read_texts(path: Path) -> Texts:
    """Read a .npy file. Raises UserError unless it holds the token ids of LEAST texts or more, of one length."""
    expected = f"expected int64 (N, T), {LEAST} texts or more of one length of at least 2 tokens, ids of 0 or more"
    try:
        ids = np.load(path, allow_pickle=False)
    except UNREADABLE_ARRAYS as error:
        raise UserError(f"'{path}' cannot be read ({' '.join(str(error).split())}): {expected}") from error
    if not isinstance(ids, np.ndarray):
        raise UserError(f"'{path}' holds several arrays: {expected}; write it with np.save")
    if ids.dtype != np.int64 or ids.ndim != 2 or len(ids) < LEAST or ids.shape[1] < 2:
        raise UserError(f"'{path}' holds {ids.dtype} {ids.shape}: {expected}")
    if ids.min() < 0:
        raise UserError(f"'{path}' holds the id {ids.min()}: {expected}")
    return Texts(ids)
