"""RetinaNet beside torchvision's own, whose weights have the same names."""

import pytest
import torch
from torchvision.models.detection.retinanet import RetinaNet as Theirs

from calib.task import boxes_of
from calib.weights.load import load_net
from calib.weights.torchvision_detectors import BUILDERS, RetinaNet
from calib.weights.zoo import spec_of
from deploy.measure.boxes import decoded

SIZE = (96, 128)


@pytest.fixture(scope="module")
def ours():
    torch.manual_seed(0)
    net = RetinaNet("resnet18", classes=5)
    for layer in (net.head.classification_head.cls_logits, net.head.regression_head.bbox_reg):
        torch.nn.init.normal_(layer.weight, std=0.3 if layer.out_channels > 40 else 0.05)
        torch.nn.init.constant_(
            layer.bias, -2.0 if layer.out_channels > 40 else 0.0
        )  # of .01, with torchvision's start
    return net.eval()


def test_boxes_are_those_of_torchvision(ours):
    theirs = Theirs(ours.backbone, 5, min_size=96, max_size=128, image_mean=[0, 0, 0], image_std=[1, 1, 1])
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        expected = theirs.eval()(list(images))
        outputs = {name: value.numpy() for name, value in ours(images).items()}
    said = boxes_of({**ours.boxes, "image": SIZE}, {name: value.shape[1:] for name, value in outputs.items()}, "")
    assert said.classes == 5
    for found, other in zip(decoded(outputs, said), expected, strict=True):
        assert len(found.scores) > 20
        count = len(found.scores)
        assert found.scores == pytest.approx(other["scores"][:count].numpy(), abs=1e-5)
        assert found.classes.tolist() == other["labels"][:count].tolist()
        assert found.places == pytest.approx(other["boxes"][:count].numpy(), abs=1e-2)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_short_name_reads_images_of_any_size(name):
    loaded = load_net(spec_of(name, None, SIZE), "random")
    with torch.no_grad():
        outputs = loaded.net(torch.rand(2, 3, *SIZE))
    said = boxes_of(loaded.net.boxes, {key: tuple(value.shape[1:]) for key, value in outputs.items()}, name)
    assert said.image == SIZE
    assert said.classes == 91
