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
    for parameter in net.head.parameters():  # torchvision starts with scores of .01
        torch.nn.init.normal_(parameter, std=0.02)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    net.train()(torch.rand(4, 3, *SIZE))  # statistics of some images, so that the network does not blow up
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
