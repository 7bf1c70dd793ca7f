"""Logits of the token behind every place of a text, (N, T, vocabulary), as language models return them."""

from typing import Any

import numpy as np

from calib.task import Task
from deploy.measure import top1
from deploy.measure.outputs import Outputs
from deploy.measure.tasks.classifier import log_softmax
from deploy.measure.tasks.classifier import measures as of_classes

points_lost = top1.points_lost


def measures(reference: Outputs, output: Outputs, task: Task, _labels: Any) -> dict[str, Any]:
    """Return how often the next token is the same, over all places of all texts, and the divergence of probabilities."""
    exact, found = (
        {name: logits.reshape(-1, logits.shape[-1]) for name, logits in each.items()} for each in (reference, output)
    )
    return {**of_classes(exact, found, task, None), "top1_kind": "next token"}


def losses(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return the loss of telling each of `ids` (N, T) by the `logits` (N, T, vocabulary) one place before it.

    (N, T - 1) in nats, float64: the first token is not told.
    """
    return -np.take_along_axis(log_softmax(logits[:, :-1]), ids[:, 1:, None], 2)[..., 0]


def perplexity(logits: np.ndarray, ids: np.ndarray, mask: np.ndarray) -> float:
    """Return exp of the mean of `losses` over all places that `mask` (N, T) marks; what fills up a text has the mark 0."""
    read = mask[:, 1:] != 0
    return float(np.exp((losses(logits, ids) * read).sum() / read.sum()))
