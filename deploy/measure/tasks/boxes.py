"""Boxes of a detector, as calib/task.py describes its outputs."""

import contextlib
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from calib.images.annotations import CLASS, CROWD
from calib.task import Task
from deploy.measure.boxes import Found, decoded, overlaps
from deploy.measure.outputs import Outputs
from deploy.measure.top1 import points

if TYPE_CHECKING:
    from deploy.measure.accuracy import Fidelity

CERTAIN = 0.3  # score of the float network's boxes that count as true
LEAST_AP = 0.01  # of the float network on annotations: below it they are of other classes or places, and tell nothing
SAME = 0.5  # intersection over union of two boxes of one object


def average_precision(truth: Sequence[Found], found: Sequence[Found]) -> tuple[float | None, float | None]:
    """The average precision of the boxes `found` at an overlap of .5, and its mean over .5, .55 to .95, by COCO's rules.

    Both hold the boxes of the same images. A true box with a score of 0 is a crowd: boxes in it count for nothing. None
    where no image has a true box.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def rows(every: Sequence[Found]) -> list[dict[str, Any]]:
        return [
            {
                "image_id": image, "category_id": int(kind), "score": float(score), "iscrowd": int(score == 0),
                "bbox": [*place[:2].tolist(), *(place[2:] - place[:2]).tolist()],
                "area": float((place[2:] - place[:2]).prod()),
            }
            for image, one in enumerate(every)
            for place, score, kind in zip(one.places, one.scores, one.classes, strict=True)
        ]  # fmt: skip

    exact, candidates = rows(truth), rows(found)
    if all(row["iscrowd"] for row in exact):
        return None, None
    if not candidates:
        return 0.0, 0.0
    for number, row in enumerate(exact, 1):
        row["id"] = number
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in range(len(truth))],
        "annotations": exact,
        "categories": [{"id": kind} for kind in sorted({row["category_id"] for row in exact})],
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(candidates), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[1]), float(evaluation.stats[0])


def lost_and_moved(truth: Sequence[Found], found: Sequence[Found]) -> tuple[int, float | None]:
    """(number of true boxes that are lost, median distance in pixels that the corners of the others moved).

    A box is lost if no box of its class that overlaps it by `SAME` has at least half of its score. The distance is the
    largest of the four sides.
    """
    lost, moved = 0, []
    for exact, other in zip(truth, found, strict=True):
        same = overlaps(exact.places, other.places) >= SAME
        same &= exact.classes[:, None] == other.classes
        same &= other.scores >= exact.scores[:, None] / 2
        for place, candidates in zip(exact.places, same, strict=True):
            if candidates.any():
                moved.append(np.abs(other.places[candidates] - place).max(1).min())
            else:
                lost += 1
    return lost, float(np.median(moved)) if moved else None


def measures(reference: Outputs, output: Outputs, task: Task, labels: Sequence[np.ndarray] | None) -> dict[str, Any]:
    """Return how well a network finds the boxes that the float network is certain of (a score above `CERTAIN`)."""
    assert task.boxes is not None
    exact, found = ([*decoded(outputs, task.boxes)] for outputs in (reference, output))
    truth = [each.above(CERTAIN) for each in exact]
    ap50, ap = average_precision(truth, found)
    lost, moved = lost_and_moved(truth, found)
    return {
        "boxes": sum(len(each.scores) for each in truth), "ap50": ap50, "ap": ap, "lost": lost, "moved_px": moved,
        **({} if labels is None else beside_labels(exact, found, labels)),
    }  # fmt: skip


def points_lost(found: "Fidelity") -> tuple[float, str]:
    """Return (percentage points, what they are in words): of average precision on annotations, without any beside float."""
    if found.true_ap is not None and (found.reference_true_ap or 0.0) >= LEAST_AP:
        drop = points((found.reference_true_ap or 0.0) - found.true_ap)
        return drop, f"average precision on the annotations falls by {drop:.2f} points"
    if found.ap50 is None:
        return math.nan, "the float network is certain of no box"
    lost = points(1 - found.ap50)
    return lost, f"average precision (overlap .5) beside the float network's boxes is {lost:.2f} points below 100"


def beside_labels(exact: Sequence[Found], found: Sequence[Found], labels: Sequence[np.ndarray]) -> dict[str, Any]:
    """Return the average precision of both networks beside boxes that people drew (calib/images/annotations.py)."""
    truth = [Found(each[:, :4], 1 - each[:, CROWD], each[:, CLASS].astype(np.int64)) for each in labels]
    (_, of_float), (_, of_int8) = (average_precision(truth, each) for each in (exact, found))
    return {"true_ap": of_int8, "reference_true_ap": of_float}
