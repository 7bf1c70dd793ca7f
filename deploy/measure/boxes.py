"""From a detector's outputs to boxes: what stays outside the engine (calib/task.py tells the forms). No torch.

The same code judges a package and may be used behind a server: `decoded(outputs, boxes)`, with `boxes` of manifest.json.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from calib.task import BINS, CENTERS, DELTAS, PLACES, SCORES, SOFTMAX, Boxes
from deploy.measure.outputs import Outputs

LEAST_SCORE = 0.05  # of a box that is found, as COCO's evaluation of RetinaNet and torchvision take it
CANDIDATES, MOST = 1000, 100  # boxes of an image before and behind the suppression of repeated ones
LARGEST_STEP = np.log(1000 / 16)  # of a logarithm of sizes, as in Faster R-CNN


@dataclass(frozen=True)
class Found:
    """The boxes of one image, best first. `places` (K, 4): left, top, right, bottom in pixels; `scores`, `classes` (K,)."""

    places: np.ndarray
    scores: np.ndarray
    classes: np.ndarray

    def above(self, score: float) -> "Found":
        """Those with a higher score."""
        kept = self.scores > score
        return Found(self.places[kept], self.scores[kept], self.classes[kept])


def overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The intersection over union (N, M) of boxes `a` (N, 4) and `b` (M, 4) as left, top, right, bottom."""
    low, high = np.maximum(a[:, None, :2], b[:, :2]), np.minimum(a[:, None, 2:], b[:, 2:])
    common = np.clip(high - low, 0, None).prod(2)
    area_a, area_b = (np.clip(each[:, 2:] - each[:, :2], 0, None).prod(1) for each in (a, b))
    return common / np.maximum(area_a[:, None] + area_b - common, np.finfo(np.float64).tiny)


def kept_by_suppression(places: np.ndarray, scores: np.ndarray, limit: float) -> np.ndarray:
    """The indices, best score first, of boxes that no better one overlaps by more than `limit` (non-maximum suppression)."""
    left = np.argsort(-scores, kind="stable")
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        left = left[overlaps(places[best : best + 1], places[left])[0] <= limit]
    return np.array(kept, np.int64)


def anchors(said: Boxes) -> np.ndarray:
    """The anchors (K, 4) of all levels: row by row, and at every place size within ratio, as torchvision orders them."""
    every = []
    for stride, sizes in zip(said.strides, said.sizes, strict=True):
        heights = np.sqrt(np.array(said.ratios))[:, None] * np.array(sizes)
        widths = (1 / np.sqrt(np.array(said.ratios)))[:, None] * np.array(sizes)
        shapes = np.stack([-widths.ravel(), -heights.ravel(), widths.ravel(), heights.ravel()], 1) / 2
        h, w = said.grid(stride)
        y, x = np.meshgrid(np.arange(h) * (said.image[0] // h), np.arange(w) * (said.image[1] // w), indexing="ij")
        at = np.stack([x, y, x, y], 2).reshape(-1, 1, 4)
        every.append((at + np.round(shapes)).reshape(-1, 4))
    return np.concatenate(every)


def _from_bins(outputs: Outputs, said: Boxes, image: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits (K, classes) and boxes (K, 4) of the image: each distance is the mean over the bins of its softmax."""
    logits, places = [], []
    for stride in said.strides:
        h, w = said.grid(stride)
        scores = outputs[f"{SCORES}_{stride}"][image].reshape(said.classes, -1).T
        bins = outputs[f"{PLACES}_{stride}"][image].astype(np.float64).reshape(4, said.bins, -1).transpose(2, 0, 1)
        share = np.exp(bins - bins.max(2, keepdims=True))
        left, top, right, bottom = (share @ np.arange(said.bins) / share.sum(2)).T * stride
        y, x = np.meshgrid((np.arange(h) + 0.5) * stride, (np.arange(w) + 0.5) * stride, indexing="ij")
        logits.append(scores)
        places.append(np.stack([x.ravel() - left, y.ravel() - top, x.ravel() + right, y.ravel() + bottom], 1))
    return np.concatenate(logits), np.concatenate(places)


def _from_deltas(deltas: np.ndarray, said: Boxes) -> np.ndarray:
    """Boxes (K, 4) of offsets in units of the anchor and of logarithms of sizes, (K, 4)."""
    at = anchors(said)
    size = at[:, 2:] - at[:, :2]
    middle = at[:, :2] + size / 2 + deltas[:, :2] * size
    half = np.exp(np.minimum(deltas[:, 2:], LARGEST_STEP)) * size / 2
    return np.concatenate([middle - half, middle + half], 1)


def _candidates(outputs: Outputs, said: Boxes, image: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits (K, classes) and boxes (K, 4) in pixels of one image."""
    if said.form == BINS:
        return _from_bins(outputs, said, image)
    logits, places = outputs[SCORES][image], outputs[PLACES][image].astype(np.float64)
    if said.form == DELTAS:
        places = _from_deltas(places, said)
    elif said.form == CENTERS:
        height, width = said.image
        places = np.concatenate([places[:, :2] - places[:, 2:] / 2, places[:, :2] + places[:, 2:] / 2], 1)
        places = places * (width, height, width, height)
    return logits, places


def _probabilities(logits: np.ndarray, said: Boxes) -> np.ndarray:
    """Of every class (K, classes); the background's is 0."""
    logits = logits.astype(np.float64)
    if said.activation != SOFTMAX:
        return 1 / (1 + np.exp(-np.clip(logits, -60, 60)))
    share = np.exp(logits - logits.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    share[:, said.background] = 0
    return share


def decoded(outputs: Outputs, said: Boxes) -> Iterator[Found]:
    """The boxes of every image, from a detector's `outputs` (B, ...) by name.

    Boxes are cut at the border of the image; empty ones, those with a score of at most `LEAST_SCORE` and those that repeat
    a better one of their class are dropped, and no more than `MOST` remain.
    """
    height, width = said.image
    for image in range(len(next(iter(outputs.values())))):
        logits, places = _candidates(outputs, said, image)
        scores = _probabilities(logits, said)
        rows, classes = np.nonzero(scores > LEAST_SCORE)
        order = np.argsort(-scores[rows, classes], kind="stable")[:CANDIDATES]
        rows, classes = rows[order], classes[order]
        found = Found(np.clip(places[rows], 0, (width, height, width, height)), scores[rows, classes], classes)
        kept = (found.places[:, 2:] > found.places[:, :2]).all(1)
        if said.nms is not None:
            apart = found.places + (found.classes * 2 * max(height, width))[:, None]  # boxes of two classes never meet
            first = kept_by_suppression(apart, found.scores, said.nms)
            kept &= np.isin(np.arange(len(rows)), first)
        best = np.nonzero(kept)[0][:MOST]
        yield Found(found.places[best], found.scores[best], found.classes[best])
