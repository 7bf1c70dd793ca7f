"""What a detector says of its boxes, and what is refused."""

import json

import pytest
import torch
from torch import nn

from calib.errors import UserError
from calib.outputs import Output, task_of
from calib.task import Boxes, Task, boxes_of

CORNERS = {"form": "corners", "image": (64, 96), "classes": 3}
BINS = {"form": "bins", "image": [60, 96], "classes": 3, "strides": [8, 16], "bins": 4}
DELTAS = {"form": "deltas", "image": (64, 96), "classes": 3, "strides": (32,), "sizes": ((8, 16),), "ratios": (1.0,)}
FLAT = {"scores": (5, 3), "boxes": (5, 4)}


def test_the_forms_and_the_outputs_that_fit_them():
    assert boxes_of(CORNERS, {**FLAT, "masks": (7,)}, "Net").nms == 0.6
    levels = {"scores_8": (3, 8, 12), "boxes_8": (16, 8, 12), "scores_16": (3, 4, 6), "boxes_16": (16, 4, 6)}
    assert boxes_of(BINS, levels, "Net").strides == (8, 16)  # 60 pixels are 7.5 cells: 8
    assert boxes_of(DELTAS, {"scores": (12, 3), "boxes": (12, 4)}, "Net") == Boxes(**DELTAS)


def test_the_manifest_tells_enough_to_decode():
    said = boxes_of(DELTAS, {"scores": (12, 3), "boxes": (12, 4)}, "Net")
    assert boxes_of(json.loads(json.dumps(said.to_json())), {"scores": (12, 3), "boxes": (12, 4)}, "Net") == said


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ("corners", "says boxes = 'corners'"),
        ({"form": "xywh"}, "form 'xywh' is none of corners, centers"),
        ({"clases": 3}, "Did you mean 'classes'"),
        ({"image": 64}, "image 64 is not height and width"),
        ({"image": (64, 96.5)}, "not whole numbers"),
        ({"classes": 0}, "classes 0"),
        ({"classes": "3"}, "classes '3'"),
        ({"activation": "tanh"}, "activation 'tanh'"),
        ({"activation": "softmax"}, "background None"),
        ({"background": 0}, "background 0"),
        ({"nms": 7}, "nms 7"),
        ({"form": "bins"}, "needs strides"),
        ({"form": "deltas", "strides": 8, "sizes": ((8,),), "ratios": (1.0,)}, "strides are not whole numbers"),
        ({"form": "bins", "strides": (8,)}, "number of bins"),
        ({"form": "deltas", "strides": (8,)}, "needs ratios"),
        ({"form": "deltas", "strides": (8,), "ratios": (1,)}, "sizes of the anchors"),
        ({"classes": 4}, r"should be scores \(K, 4\), boxes \(K, 4\): they are scores \(5, 3\)"),
    ],
)
def test_what_does_not_describe_the_outputs_is_one_line(change, wrong):
    described = change if isinstance(change, str) else {**CORNERS, **change}
    with pytest.raises(UserError, match=wrong):
        boxes_of(described, FLAT, "Net")
    with pytest.raises(UserError, match="without 'classes'"):
        boxes_of({"form": "corners", "image": (4, 4)}, FLAT, "Net")
    with pytest.raises(UserError, match="should be"):
        boxes_of(CORNERS, {"scores": (5, 3), "boxes": (6, 4)}, "Net")


def test_a_network_says_so_by_an_attribute():
    outputs = (Output("scores", (5, 3)), Output("boxes", (5, 4)))
    net = nn.Module()
    assert task_of(net, outputs) == Task("values")
    net.boxes = CORNERS
    assert task_of(net, outputs) == Task("boxes", Boxes(**CORNERS))
    for other in (nn.Linear(2, 2), torch.zeros(2), lambda: None):  # a part of the network that has this name
        net = nn.Module()
        net.boxes = other
        assert task_of(net, outputs) == Task("values")
