"""The whole pipeline on networks of a user's own with several outputs, and with a picture as output."""

import json

import numpy as np
import onnx
import pytest

from calib.task import boxes_of
from deploy import cli
from deploy.measure.boxes import decoded
from deploy.verify import verify_package

pytestmark = pytest.mark.slow

pytest.importorskip("tensorrt_rtx")

NETS = '''
import torch
from torch import nn


class Detector(nn.Module):
    """Scores on two levels, and boxes."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU())
        self.first = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU())
        self.scores, self.boxes = nn.Conv2d(32, 8, 1), nn.Conv2d(32, 16, 1)

    def forward(self, images):
        near = self.first(self.stem(images))
        far = self.second(near)
        boxes = [self.boxes(each).flatten(2).transpose(1, 2) for each in (near, far)]
        return {"scores": [self.scores(near), self.scores(far)], "boxes": 100 * torch.cat(boxes, 1)}


class Boxes(Detector):
    """The scores and corners of 80 candidates."""

    boxes_said = {"form": "corners", "classes": 8}

    def __init__(self):
        super().__init__()
        self.places = nn.Conv2d(32, 16, 1)
        del self.boxes
        self.boxes = self.boxes_said

    def forward(self, images):
        near = self.first(self.stem(images))
        maps = (near, self.second(near))
        flat = lambda layer: torch.cat([layer(each).flatten(2).transpose(1, 2) for each in maps], 1)
        low, size = flat(self.places)[:, :, 8:].split((4, 4), 2)
        low, size = 16 + 8 * low[:, :, :2], 1 + 10 * size[:, :, :2].abs()
        return {"scores": 4 * flat(self.scores), "boxes": torch.cat([low, low + size], 2)}


class Upscaler(nn.Module):
    """A picture twice as large."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU())
        self.tail = nn.Conv2d(16, 12, 3, 1, 1)

    def forward(self, images):
        return nn.functional.pixel_shuffle(self.tail(self.body(images)), 2)


def detector():
    torch.manual_seed(0)
    return Detector()


def boxes():
    torch.manual_seed(0)
    return Boxes()


def upscaler():
    torch.manual_seed(0)
    return Upscaler()
'''


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "nets.py").write_text(NETS)
    np.save(folder / "images.npy", np.random.default_rng(0).normal(size=(24, 3, 32, 32)).astype(np.float32))

    def run(factory):
        command = [
            "engine", "--module", f"{folder / 'nets.py'}:{factory}", "--input", "32", "--calib", str(folder / "images.npy"),
            "--calib-images", "16", "--sm", "89", "--cache", "off", "--out", str(folder / "out"), "--weights", "random",
            "--recipe", "int8_plain",
        ]  # fmt: skip
        assert cli.main(command) == 0
        return folder / "out" / f"nets.{factory}-random-weights" / "int8_plain"

    return run


def test_several_outputs(build, capsys):
    package = build("detector")
    names = ["scores_0", "scores_1", "boxes"]
    for file in ("model.onnx", "model.fp32.onnx"):
        assert [each.name for each in onnx.load(package / file).graph.output] == names
    report, manifest = (json.loads((package / f"{name}.json").read_text()) for name in ("report", "manifest"))
    assert list(report["fidelity"]["outputs"]) == names
    assert report["fidelity"]["top1_agreement"] is None
    assert manifest["task"] == "values"
    (given,) = manifest["io"]["inputs"]
    assert given == {
        "name": "input", "dtype": "float16", "min": [1, 3, 32, 32], "opt": [8, 3, 32, 32], "max": [32, 3, 32, 32]
    }  # fmt: skip
    assert [(each["name"], each["max"]) for each in manifest["io"]["outputs"]] == [
        ("scores_0", [32, 8, 8, 8]), ("scores_1", [32, 8, 4, 4]), ("boxes", [32, 80, 16])
    ]  # fmt: skip
    with np.load(package / "golden.npz") as golden:
        assert golden["float_boxes"].shape == (8, 80, 16)
    assert verify_package(package) == []
    assert "scores_1" in capsys.readouterr().out


def test_boxes_are_compared_with_those_of_the_float_network(build, capsys):
    package = build("boxes")
    manifest, report = (json.loads((package / f"{name}.json").read_text()) for name in ("manifest", "report"))
    assert manifest["task"] == "boxes"
    assert manifest["boxes"] | {"form": "corners", "image": [32, 32], "classes": 8} == manifest["boxes"]
    found = report["fidelity"]
    assert found["boxes"] > 20
    assert 0.5 < found["ap"] <= found["ap50"] <= 1
    assert "AP 0." in capsys.readouterr().out
    # outside the engine, with nothing but the package
    with np.load(package / "golden.npz") as golden:
        outputs = {name: golden[f"float_{name}"] for name in ("scores", "boxes")}
    said = boxes_of(manifest["boxes"], {name: array.shape[1:] for name, array in outputs.items()}, "it")
    every = [*decoded(outputs, said)]
    assert len(every) == 8
    assert all((each.places[:, 2:] > each.places[:, :2]).all() and each.places.max() <= 32 for each in every)


def test_a_picture_as_output(build):
    package = build("upscaler")
    manifest = json.loads((package / "manifest.json").read_text())
    assert [(each["name"], each["opt"]) for each in manifest["io"]["outputs"]] == [("output", [8, 3, 64, 64])]
    assert verify_package(package) == []
