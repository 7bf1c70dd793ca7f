"""Logits of the token behind every place of a text, (N, T, vocabulary), as language models return them."""

from typing import Any

from calib.task import Task
from deploy.measure import top1
from deploy.measure.outputs import Outputs
from deploy.measure.tasks.classifier import measures as of_classes

points_lost = top1.points_lost


def measures(reference: Outputs, output: Outputs, task: Task, _labels: Any) -> dict[str, Any]:
    """Return how often the next token is the same, over all places of all texts, and the divergence of probabilities."""
    exact, found = (
        {name: logits.reshape(-1, logits.shape[-1]) for name, logits in each.items()} for each in (reference, output)
    )
    return {**of_classes(exact, found, task, None), "top1_kind": "next token"}
