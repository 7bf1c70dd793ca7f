"""Logits of classes, (N, classes)."""

from typing import Any

import numpy as np

TOP1 = True  # whether `measures` gives an agreement of top-1 results


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def measures(reference: np.ndarray, output: np.ndarray, labels: np.ndarray | None) -> dict[str, Any]:
    """Return how often the class is the same, the divergence of probabilities, and accuracies if there are `labels` (N,)."""
    winner, reference_winner = output.argmax(1), reference.argmax(1)
    p, q = _log_softmax(reference), _log_softmax(output)
    return {
        "top1_agreement": float((winner == reference_winner).mean()),
        "top1_kind": "class",
        "kl": float((np.exp(p) * (p - q)).sum(1).mean()),
        "top1": None if labels is None else float((winner == labels).mean()),
        "reference_top1": None if labels is None else float((reference_winner == labels).mean()),
    }
