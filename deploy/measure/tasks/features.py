"""Features of an image, (N, D), compared with those of other images by cosine."""

from typing import Any

import numpy as np

from calib.task import Task
from deploy.measure import top1
from deploy.measure.outputs import Outputs, only

points_lost = top1.points_lost
NEIGHBOUR_ROWS = 1024  # nearest neighbours are searched among the first rows only: cost grows with the square


def unit(rows: np.ndarray) -> np.ndarray:
    """Return `rows` (N, D) divided by their lengths."""
    rows = rows.astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float64).tiny)


def nearest_neighbours(features: np.ndarray) -> np.ndarray:
    """The index (N,) of the most similar other row (by cosine) for each row of `features` (N, D)."""
    similarity = unit(features) @ unit(features).T
    np.fill_diagonal(similarity, -np.inf)
    return similarity.argmax(1)


def measures(reference: Outputs, output: Outputs, _task: Task, _labels: Any) -> dict[str, Any]:
    """Return how often the most similar other image is the same one."""
    same = nearest_neighbours(only(reference)[:NEIGHBOUR_ROWS]) == nearest_neighbours(only(output)[:NEIGHBOUR_ROWS])
    return {"top1_agreement": float(same.mean()), "top1_kind": "nearest neighbour"}
