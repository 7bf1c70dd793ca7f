"""What is measured of a rounded language model beside the float one, text by text: logits of many texts are large."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.language.texts import BATCH, rows
from calib.outputs import named_outputs, separate_outputs
from deploy.measure.accuracy import MAX_SQNR_DB, powers
from deploy.measure.tasks.tokens import losses


@dataclass(frozen=True)
class Figures:
    """The figures of one row.

    `perplexity`: over all places of all texts. `last_token`: share of texts whose last token is the one told (AdaQTransform,
    table 7). Beside float: `agreement`, the share of places with the same next token; `sqnr_db` of all logits;
    `loss_more`, by how much the loss of a text is larger (nats per token, mean over texts), and its standard error.
    """

    texts: int
    perplexity: float
    last_token: float
    agreement: float
    sqnr_db: float
    loss_more: float
    loss_error: float

    def to_json(self) -> dict[str, Any]:
        """The figures as plain values."""
        return asdict(self)


@dataclass
class Sums:
    """What `Figures` are made from, over the texts seen so far."""

    loss: list[float] = field(default_factory=list)  # nats per token, by text
    float_loss: list[float] = field(default_factory=list)
    last: int = 0
    same: int = 0
    places: int = 0
    signal: float = 0.0
    noise: float = 0.0

    def add(self, exact: np.ndarray, found: np.ndarray, ids: np.ndarray) -> None:
        """Add the logits (N, T, vocabulary) of the float network and of the other one on `ids` (N, T)."""
        self.loss += losses(found, ids).mean(1).tolist()
        self.float_loss += losses(exact, ids).mean(1).tolist()
        told, told_by_float = found.argmax(-1), exact.argmax(-1)
        self.last += int((told[:, -2] == ids[:, -1]).sum())
        self.same += int((told == told_by_float).sum())
        self.places += told.size
        signal, noise = powers(exact, found)
        self.signal += float(signal.sum())
        self.noise += float(noise.sum())

    def figures(self) -> Figures:
        """Return the figures; all texts are of one length, so that the mean over texts is that over places."""
        more = np.array(self.loss) - np.array(self.float_loss)
        count = len(more)
        return Figures(
            texts=count,
            perplexity=math.exp(np.mean(self.loss)),
            last_token=self.last / count,
            agreement=self.same / self.places,
            sqnr_db=MAX_SQNR_DB if self.noise == 0 else float(10 * np.log10(self.signal / self.noise)),
            loss_more=float(more.mean()),
            loss_error=float(more.std(ddof=1) / math.sqrt(count)) if count > 1 else 0.0,
        )


def logits_of(net: nn.Module, read: Tensor) -> np.ndarray:
    """Return the logits (N, T, vocabulary) of `net`, not as the judge of stages reads them, divided by their size."""
    with separate_outputs(net):
        (logits,) = named_outputs(net(read)).values()
    return logits.cpu().numpy()


@torch.inference_mode()
def judge(exact: nn.Module, net: nn.Module, ids: np.ndarray, device: torch.device) -> Figures:
    """Return the figures of `net` beside `exact` on the texts `ids` (N, T), on `device`."""
    sums = Sums()
    for start in range(0, len(ids), BATCH):
        some = ids[start : start + BATCH]
        read = rows(some, device)
        sums.add(logits_of(exact, read), logits_of(net, read), some)
    return sums.figures()
