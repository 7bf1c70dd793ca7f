"""What stages refuse."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch import nn

from calib.errors import UserError
from calib.images.image_set import ImageSet
from calib.images.preprocess import Preprocessing
from calib.inputs import Input, Inputs
from calib.outputs import Output
from deploy import steps
from deploy.engine.kernels import Kernel
from deploy.progress import Progress
from deploy.steps import _check_labels, _few_enough, _outputs

PLAIN = Preprocessing(8, 8, 8, 8, "bilinear", (0.5,) * 3, (0.5,) * 3)


def test_a_class_that_a_classifier_has_no_output_for_is_refused():
    images = ImageSet("made up", PLAIN, (), labels=(0, 5))
    with pytest.raises(UserError, match="class 5, but the network has 5 outputs: expected classes 0 to 4"):
        _check_labels(images, 5)
    _check_labels(images, 6)


def test_a_network_that_computes_nan_is_refused_with_its_first_module():
    net = timm.create_model("test_resnet").eval()
    net.layer1[0].bn1.running_var[0] = -1e-3
    with pytest.raises(UserError, match=r"computes NaN or Inf, first in 'layer1\.0\.bn1'"):
        _outputs(net, torch.zeros(2, 3, 64, 64))


def test_a_float_network_that_does_not_fit_fp16_has_no_twin_and_says_why(monkeypatch):
    kernel = Kernel("k", "other", (), (), ())
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 8 * 8, 2)).eval()
    monkeypatch.setattr(steps.onnx, "load", lambda path: path)
    monkeypatch.setattr(steps, "halved", lambda graph: graph)
    twin = SimpleNamespace(kernels=(kernel, kernel))
    run = SimpleNamespace(
        beyond_fp16=steps._beyond_fp16(net),
        float_model="float.onnx",
        backend=SimpleNamespace(FP16=True),
        built=SimpleNamespace(kernels=(kernel,)),
        options=SimpleNamespace(built_for=lambda: None),
        engines=SimpleNamespace(built=lambda *_: (twin, "", ())),
        anew=False,
    )
    lists = steps._kernel_lists(run)
    assert (lists.int8, lists.fp16, lists.why_no_twin) == ((kernel,), (kernel, kernel), "")

    net[0].weight.data[0] = 1e6
    run.beyond_fp16 = steps._beyond_fp16(net)
    lists = steps._kernel_lists(run)
    assert (lists.int8, lists.fp16) == ((kernel,), None)
    assert "FP16" in lists.why_no_twin


def test_a_backend_without_fp16_has_no_twin():
    kernel = Kernel("k", "other", (), (), ())
    run = SimpleNamespace(backend=SimpleNamespace(FP16=False, NAME="cpu"), built=SimpleNamespace(kernels=(kernel,)))
    lists = steps._kernel_lists(run)
    assert (lists.int8, lists.fp16) == ((kernel,), None)
    assert lists.why_no_twin == "engines of cpu have FP32 types beside their integers"


class Counted:
    """A set of 20 images of one value each, which counts how often it is read."""

    count, reads, preprocessing = 20, 0, PLAIN

    def batches(self, size):
        self.reads += 1
        for start in range(0, self.count, size):
            yield np.full((min(size, self.count - start), 3, 2, 2), start, np.float32)


@pytest.mark.parametrize(("side", "count"), [(224, 16), (448, 16), (518, 11), (896, 4), (8192, 1)])
def test_fewer_large_images_go_through_a_network_at_once(side, count):
    assert steps.per_pass(replace(PLAIN, height=side, width=side)) == count
    assert steps.per_pass(Inputs((Input("latent", "float32", (4, side, side)),))) == 16
    small = replace(PLAIN, height=8, width=8)
    assert steps.per_pass(small, (Output("scores", (91, 9)), Output("picture", (3, side, side)))) == count


@pytest.mark.parametrize(("most", "reads"), [(20 * 12 * 4 + 12 * 4 * 12, 1), (100, 3), (4 * 12 * 4 * 2, 3)])
def test_a_small_set_is_read_once_and_stays_what_it_was(monkeypatch, most, reads):
    monkeypatch.setattr(steps, "KEPT_BYTES", most)
    images = Counted()
    batches = steps.Batches(images, Progress("test"), torch.from_numpy)
    next(iter(batches))  # looked at, not read to the end: nothing is kept of it
    images.reads = 0
    for _ in range(3):
        found = list(batches)
        assert [float(batch.mean()) for batch in found] == [0, steps.BATCH]
        for batch in found:
            batch.fill_(7)
    assert images.reads == reads


def test_so_many_images_judge_as_have_outputs_that_fit_into_memory(monkeypatch):
    images = ImageSet("made up", PLAIN, tuple(range(100)), labels=tuple(range(100)))
    maps = (Output("scores", (10, 4)), Output("boxes", (10, 4)))  # 320 bytes an image
    assert _few_enough(images, maps) is images
    monkeypatch.setattr(steps, "JUDGED_BYTES", 320 * 40)
    fewer = _few_enough(images, maps)
    assert (fewer.count, fewer.labels, fewer.too_many) == (40, tuple(range(40)), 60)
    assert fewer.left_out() == ["60 left out: the outputs of so many images would not fit into memory"]
    monkeypatch.setattr(steps, "JUDGED_BYTES", 1)
    assert _few_enough(images, maps).count == steps.GOLDEN_IMAGES
