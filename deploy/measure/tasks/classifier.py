"""Logits of classes, (N, classes)."""

from typing import Any

import numpy as np

from calib.task import Task
from deploy.measure import top1
from deploy.measure.outputs import Outputs, only

points_lost = top1.points_lost


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the logarithms of the probabilities that `logits` (..., classes) stand for, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def measures(reference: Outputs, output: Outputs, _task: Task, labels: Any) -> dict[str, Any]:
    """Return how often the class is the same, the divergence of probabilities, and accuracies if there are `labels` (N,)."""
    exact, found = only(reference), only(output)
    winner, reference_winner = found.argmax(1), exact.argmax(1)
    p, q = log_softmax(exact), log_softmax(found)
    return {
        "top1_agreement": float((winner == reference_winner).mean()),
        "top1_kind": "class",
        "kl": float((np.exp(p) * (p - q)).sum(1).mean()),
        "top1": None if labels is None else float((winner == labels).mean()),
        "reference_top1": None if labels is None else float((reference_winner == labels).mean()),
    }
