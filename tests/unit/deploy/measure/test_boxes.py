"""From outputs to boxes, against torchvision's own decoding and against boxes by hand."""

import numpy as np
import pytest
import torch
import torchvision
from torchvision.models.detection import _utils
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from calib.task import Boxes, Task
from deploy.measure.accuracy import fidelity
from deploy.measure.boxes import Found, anchors, decoded, kept_by_suppression, overlaps
from deploy.measure.tasks.boxes import average_precision, lost_and_moved

IMAGE = (96, 128)
RETINANET = Boxes("deltas", IMAGE, 3, nms=0.5, strides=(8, 16), sizes=((32, 40), (64, 80)), ratios=(0.5, 1.0, 2.0))


def found(*rows):
    """Boxes of one image, of (left, top, right, bottom, score, class) each."""
    table = np.array(rows, np.float64).reshape(-1, 6)
    return Found(table[:, :4], table[:, 4], table[:, 5].astype(np.int64))


def logit(p):
    return float(np.log(p / (1 - p)))


def some_boxes(count):
    low = np.random.default_rng(0).uniform(0, 80, (count, 2))
    return np.concatenate([low, low + np.random.default_rng(1).uniform(5, 40, (count, 2))], 1)


def test_overlap_and_suppression_are_torchvisions():
    places, scores = some_boxes(200), np.random.default_rng(2).random(200)
    theirs = torchvision.ops.box_iou(torch.tensor(places), torch.tensor(places)).numpy()
    assert overlaps(places, places) == pytest.approx(theirs, abs=1e-9)
    kept = torchvision.ops.nms(torch.tensor(places), torch.tensor(scores), 0.4).tolist()
    assert 20 < len(kept) < 180
    assert kept_by_suppression(places, scores, 0.4).tolist() == kept


def test_anchors_are_torchvisions():
    generator = AnchorGenerator(RETINANET.sizes, (RETINANET.ratios,) * 2)
    maps = [torch.zeros(1, 4, *RETINANET.grid(stride)) for stride in RETINANET.strides]
    (theirs,) = generator(ImageList(torch.zeros(1, 3, *IMAGE), [IMAGE]), maps)
    assert len(theirs) == 6 * (12 * 16 + 6 * 8)
    assert anchors(RETINANET) == pytest.approx(theirs.numpy(), abs=1e-4)


def test_deltas_become_the_boxes_that_torchvision_makes_of_them():
    at = anchors(RETINANET)
    deltas = np.random.default_rng(0).normal(0, 0.3, (1, len(at), 4)).astype(np.float32)
    scores = np.random.default_rng(1).normal(-3, 1.5, (1, len(at), 3)).astype(np.float32)
    (ours,) = decoded({"scores": scores, "boxes": deltas}, RETINANET)
    coder = _utils.BoxCoder((1.0, 1.0, 1.0, 1.0))
    places = coder.decode_single(torch.tensor(deltas[0]), torch.tensor(at, dtype=torch.float32))
    places = torchvision.ops.clip_boxes_to_image(places, IMAGE)
    probabilities = torch.tensor(scores[0]).sigmoid()
    rows, classes = (probabilities > 0.05).nonzero(as_tuple=True)
    best = probabilities[rows, classes].topk(1000).indices
    rows, classes = rows[best], classes[best]
    kept = torchvision.ops.batched_nms(places[rows], probabilities[rows, classes], classes, 0.5)
    kept = kept[(places[rows][kept][:, 2:] > places[rows][kept][:, :2]).all(1)][:100]  # it keeps boxes of no area
    assert ours.scores == pytest.approx(probabilities[rows, classes][kept].numpy(), abs=1e-5)
    assert ours.classes.tolist() == classes[kept].tolist()
    assert ours.places == pytest.approx(places[rows][kept].numpy(), abs=1e-3)


def test_bins_hold_distances_in_units_of_the_stride():
    said = Boxes("bins", (32, 64), 2, strides=(16,), bins=5)
    scores = np.full((1, 2, 2, 4), -9, np.float32)
    scores[0, 1, 1, 2] = logit(0.9)
    bins = np.zeros((1, 4, 5, 2, 4), np.float32)
    for side, distance in enumerate((1, 0, 1, 0)):
        bins[0, side, distance, 1, 2] = 50
    (ours,) = decoded({"scores_16": scores, "boxes_16": bins.reshape(1, 20, 2, 4)}, said)
    assert ours.classes.tolist() == []  # no height: the distances to top and bottom are 0
    bins[0, 1, :, 1, 2] = bins[0, 3, :, 1, 2] = (0, 0, 0, 0, 0)  # all bins alike: their mean, 2 strides
    (ours,) = decoded({"scores_16": scores, "boxes_16": bins.reshape(1, 20, 2, 4)}, said)
    assert ours.classes.tolist() == [1]
    assert ours.scores == pytest.approx([0.9])
    assert ours.places == pytest.approx(np.array([[24, 0, 56, 32]]))  # centre (40, 24), cut at the border


def test_centers_and_a_background_class():
    said = Boxes("centers", (100, 200), 3, "softmax", background=-1, nms=None)
    scores = np.log(np.array([[[0.8, 0.1, 0.1], [0.02, 0.03, 0.95]]], np.float32))
    (ours,) = decoded({"scores": scores, "boxes": np.array([[[0.5, 0.5, 0.2, 0.4]] * 2], np.float32)}, said)
    assert ours.classes.tolist() == [0, 1]
    assert ours.scores == pytest.approx([0.8, 0.1], abs=1e-6)
    assert ours.places == pytest.approx(np.array([[80, 30, 120, 70]] * 2), abs=1e-4)


def test_equal_boxes_have_a_precision_of_one_and_missing_ones_cost():
    truth = [found((0, 0, 10, 10, 0.9, 1), (20, 20, 40, 40, 0.8, 2)), found((5, 5, 25, 25, 0.7, 1))]
    assert average_precision(truth, truth) == pytest.approx((1, 1))
    # class 1 has its two boxes, class 2 none: the mean over classes
    ap50, ap = average_precision(truth, [found((0, 0, 10, 10, 0.9, 1)), found((5, 5, 25, 25, 0.7, 1))])
    assert ap50 == pytest.approx(0.5)
    assert ap == pytest.approx(0.5)
    # an overlap of 18 * 20 / 400 = .9 counts up to there: 9 of the 10 limits
    assert average_precision([found((0, 0, 20, 20, 0.9, 0))], [found((0, 0, 18, 20, 0.9, 0))])[1] == pytest.approx(0.9)
    assert average_precision(truth, [found(), found()]) == (0, 0)
    assert average_precision([found()], [found((0, 0, 9, 9, 0.9, 0))]) == (None, None)


def test_boxes_are_lost_where_none_of_their_class_is_as_certain():
    truth = [found((0, 0, 10, 10, 0.8, 1), (50, 50, 70, 70, 0.6, 2), (80, 0, 90, 10, 0.5, 0))]
    other = [found((1, 0, 10, 12, 0.5, 1), (50, 50, 70, 70, 0.29, 2), (80, 0, 90, 10, 0.5, 1))]
    lost, moved = lost_and_moved(truth, other)
    assert lost == 2  # one has less than half of its score, one another class
    assert moved == pytest.approx(2)
    assert lost_and_moved(truth, [found()]) == (3, None)


def test_a_detector_is_judged_by_its_boxes():
    said = Boxes("corners", (64, 64), 2)
    scores = np.full((2, 3, 2), -9, np.float32)
    scores[:, 0, 1] = logit(0.9)
    places = np.tile(np.array([[8, 8, 40, 40], [0, 0, 5, 5], [0, 0, 6, 6]], np.float32), (2, 1, 1))
    reference = {"scores": scores, "boxes": places}
    measured = fidelity(reference, {"scores": scores, "boxes": places + 1}, Task("boxes", said))
    assert (measured.boxes, measured.lost, measured.moved_px) == (2, 0, pytest.approx(1))
    assert measured.ap50 == pytest.approx(1)
    assert set(measured.outputs) == {"scores", "boxes"}


def test_both_networks_are_measured_beside_annotations():
    said = Boxes("corners", (64, 64), 2)
    scores = np.full((2, 2, 2), -9, np.float32)
    scores[:, 0, 1] = logit(0.9)
    places = np.tile(np.array([[8, 8, 40, 40], [0, 0, 5, 5]], np.float32), (2, 1, 1))
    drawn = np.array([[8, 8, 40, 40, 1, 0], [50, 50, 60, 60, 1, 1]], np.float64)
    off = places.copy()
    off[0] += 30
    measured = fidelity(
        {"scores": scores, "boxes": places}, {"scores": scores, "boxes": off}, Task("boxes", said), [drawn, drawn]
    )
    assert measured.reference_true_ap == pytest.approx(1)  # the crowd is no box that has to be found
    # one of two is found, behind a wrong box as certain: half of them right up to a recall of .5, at 51 of COCO's 101 places
    assert measured.true_ap == pytest.approx(0.5 * 51 / 101)
    same = {"scores": scores, "boxes": places}
    assert fidelity(same, same, Task("boxes", said)).true_ap is None
    crowds = [drawn[1:], drawn[1:]]
    assert fidelity(same, same, Task("boxes", said), crowds).true_ap is None  # nothing to find
