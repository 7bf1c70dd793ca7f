"""Detectors by the commands of docs/models.md, at small sizes."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from calib.errors import UserError
from deploy import cli
from deploy.verify import verify_package
from tests.docs.pages import ROOT
from tests.pipeline.test_task_examples import EXAMPLES, engine, loaded, smaller

pytestmark = pytest.mark.slow

pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 16 images of noise with a bright rectangle each."""
    folder, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(16):
        pixels = generator.integers(0, 128, (64, 96, 3), dtype=np.uint8)
        top, left = generator.integers(0, 32, 2)
        pixels[top : top + 24, left : left + 40] += 100
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_retinanet_by_name(photos, tmp_path):
    argv = [
        "engine", "--model", "retinanet_r18", "--weights", "random", "--recipe", "int8_plain", "--input", "64x96",
        "--batch", "1", "--max-batch", "4", "--cache", "off", "--out", str(tmp_path), "--calib", str(photos),
        "--target", "tensorrt_rtx", "--sm", "89",
    ]  # fmt: skip
    assert cli.main(argv) == 0
    (found,) = tmp_path.rglob("manifest.json")
    manifest, report = (json.loads((found.parent / f"{name}.json").read_text()) for name in ("manifest", "report"))
    assert verify_package(found.parent) == []
    assert (manifest["task"], manifest["boxes"]["image"]) == ("boxes", [64, 96])
    assert report["engine"]["planned"] == 67
    assert report["engine"]["lost"] == []


def test_detr(photos, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.delenv("DETR", raising=False)
    _, report, manifest = engine(
        EXAMPLES / "detr.py", "small", tmp_path, "--recipe", "int8_plain", "--input", "64x96", "--calib", photos
    )
    assert (manifest["task"], manifest["boxes"]["background"]) == ("boxes", -1)
    assert report["engine"]["fused_attention"] == 6
    assert report["engine"]["lost"] == []


@pytest.fixture(scope="module")
def faster(tmp_path_factory):
    """The example with a ResNet-18, and the file of its weights."""
    folder = tmp_path_factory.mktemp("faster")
    path = smaller(
        folder, "faster_rcnn.py", ('BACKBONE = "resnet50"', 'BACKBONE = "resnet18"'),
        ("CLASSES = 640, 91", "CLASSES = 640, 5"), ("Path(__file__).parents[2]", f"'{ROOT}'"),
    )  # fmt: skip
    torch.manual_seed(0)
    net = loaded(path).whole()
    torch.nn.init.normal_(net.roi_heads.box_predictor.cls_score.weight, std=0.5)  # so that some classes are certain
    torch.save(net.state_dict(), folder / "weights.pth")
    return path, folder / "weights.pth"


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    """The example with a Swin transformer at 224 x 224, and the file of its weights."""
    folder = tmp_path_factory.mktemp("masks")
    smaller(folder, "faster_rcnn.py")
    path = smaller(
        folder, "mask_rcnn.py", ("SIDE, CLASSES, WIDTH = 672, 91, 256", "SIDE, CLASSES, WIDTH = 224, 5, 32"),
        ("img_size=SIDE)", "img_size=SIDE, depths=(1, 1, 1, 1), embed_dim=24, num_heads=(1, 1, 1, 1))"),
        ("Path(__file__).parents[2]", f"'{ROOT}'"),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        torch.manual_seed(0)
        net = loaded(path).whole()
        torch.nn.init.normal_(net.roi_heads.box_predictor.cls_score.weight, std=0.5)
        torch.save(net.state_dict(), folder / "weights.pth")
        yield path, folder / "weights.pth"


def test_the_parts_of_mask_rcnn_are_torchvisions_network(masks, monkeypatch):
    path, weights = masks
    monkeypatch.setenv("MASK_RCNN", str(weights))
    example, image = loaded(path), torch.rand(1, 3, 224, 224)
    net = example.whole()
    net.transform.min_size, net.transform.max_size = (224,), 224
    net.transform.image_mean, net.transform.image_std = [0, 0, 0], [1, 1, 1]
    # whole masks are pasted into the image; those of the heads are compared here
    monkeypatch.setattr(net.transform, "postprocess", lambda result, *_: result)
    with torch.no_grad():
        (expected,) = net(list(image))
        first = example.Proposals().eval()
        (found,) = example.detect(net, image, first, example.Regions().eval())
        drawn = example.masks_of(net, first(image), found["boxes"], found["labels"], example.Masks().eval())
    assert len(expected["scores"]) > 5
    for name in ("boxes", "scores", "labels"):
        torch.testing.assert_close(found[name], expected[name])
    assert torch.equal(drawn, expected["masks"][:, 0] > 0.5)


def test_mask_rcnn_becomes_three_engines_that_are_compared_together(masks, photos, tmp_path, monkeypatch, capsys):
    path, weights = masks
    monkeypatch.setenv("MASK_RCNN", str(weights))
    example, options = loaded(path), ("--weights", "auto", "--recipe", "int8_plain")
    first, report, manifest = engine(path, "Proposals", tmp_path / "a", *options, "--calib", photos)
    assert (manifest["task"], manifest["boxes"]["classes"], report["engine"]["lost"]) == ("boxes", 1, [])
    assert example.main(["write", str(photos), "--to", str(tmp_path)]) == 0
    second, report, _ = engine(path, "Regions", tmp_path / "b", *options, "--calib", tmp_path / "regions.npz")
    assert report["engine"]["int8_gemms"] == 2
    third, report, _ = engine(path, "Masks", tmp_path / "c", *options, "--calib", tmp_path / "masks.npz")
    assert report["engine"]["planned"] == 4
    capsys.readouterr()
    assert example.main(["compare", str(first), str(second), str(third), str(photos)]) == 0
    said = capsys.readouterr().out
    assert "boxes of the float network: AP 0." in said
    assert "boxes of the float network: overlap 0." in said


def test_the_two_parts_of_faster_rcnn_are_torchvisions_network(faster, monkeypatch):
    path, weights = faster
    monkeypatch.setenv("FASTER_RCNN", str(weights))
    example, images = loaded(path), torch.rand(2, 3, 64, 96)
    net = example.whole()
    net.transform.min_size, net.transform.max_size = (64,), 96
    net.transform.image_mean, net.transform.image_std = [0, 0, 0], [1, 1, 1]
    with torch.no_grad():
        expected = net(list(images))
        found = example.detect(net, images, example.Proposals().eval(), example.Regions().eval())
    for ours, theirs in zip(found, expected, strict=True):
        assert len(theirs["scores"]) > 5
        for name in ("boxes", "scores", "labels"):
            torch.testing.assert_close(ours[name], theirs[name])


def test_faster_rcnn_becomes_two_engines_that_are_compared_together(faster, photos, tmp_path, monkeypatch, capsys):
    path, weights = faster
    monkeypatch.setenv("FASTER_RCNN", str(weights))
    example = loaded(path)
    first, report, manifest = engine(
        path,
        "Proposals",
        tmp_path / "a",
        "--weights",
        "auto",
        "--recipe",
        "int8_plain",
        "--input",
        "64",
        "--calib",
        photos,
    )
    assert (manifest["task"], manifest["boxes"]["classes"]) == ("boxes", 1)
    assert report["engine"]["lost"] == []
    regions = tmp_path / "regions.npz"
    assert example.main(["write", str(photos), "--side", "64", "--to", str(regions)]) == 0
    with np.load(regions) as arrays:
        assert arrays["regions"].shape[1:] == (256, 7, 7)
        assert len(set(arrays["groups"])) == 16
    second, report, _ = engine(
        path, "Regions", tmp_path / "b", "--weights", "auto", "--recipe", "int8_plain", "--calib", regions
    )
    assert report["engine"]["int8_gemms"] == 2
    capsys.readouterr()
    assert example.main(["compare", str(first), str(second), str(photos)]) == 0
    assert "boxes of the float network: AP 0." in capsys.readouterr().out
    monkeypatch.delenv("FASTER_RCNN")
    assert example.main(["compare", str(first), str(second), str(photos)]) == 2
    assert "built from other weights" in capsys.readouterr().err


@pytest.fixture(scope="module")
def rt_detr(tmp_path_factory):
    """The example at 64 x 64 pixels, and a folder with the weights of a small network of it."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("rt_detr")
    smaller(folder, "faster_rcnn.py")
    path = smaller(
        folder, "rt_detr.py", ("SIDE, SMALL_SIDE = 640, 64", "SIDE, SMALL_SIDE = 64, 64"),
        ("Path(__file__).parents[2]", f"'{ROOT}'"),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        net = loaded(path).small()
        torch.manual_seed(1)
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(module.bias, -1, 1)
        net.config.freeze_backbone_batch_norms = True
        transformers.RTDetrForObjectDetection.save_pretrained(net, folder / "weights")
        yield path, folder / "weights"


@pytest.mark.parametrize(("side", "border"), [(64, False), (416, False), (416, True)])
def test_the_two_parts_of_rt_detr_are_transformers_network(rt_detr, side, border, monkeypatch):
    """In the larger image anchors at the border are none; `border`: those are chosen all the same."""
    import transformers

    path, weights = rt_detr
    monkeypatch.setenv("RT_DETR", str(weights))
    example, images = loaded(path), torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    theirs, net = transformers.RTDetrForObjectDetection.from_pretrained(weights).eval(), example.whole()
    for each in (theirs.model, net.model) if border else ():
        each.enc_output[0].bias = torch.nn.Parameter(each.enc_score_head.weight[0].detach().clone())
    first, second = example.Encoder(net, side).eval(), example.Decoder(net, side).eval()
    with torch.no_grad():
        expected = theirs(images)
        candidates = first(images)
        found = example.detect(images, first, second, 12)
    assert any(type(module).__name__ == "RTDetrFrozenBatchNorm2d" for module in theirs.modules())
    assert bool((first.valid == 0).any()) == (side == 416)
    assert float(first.anchors.max()) < 65504
    assert float((found["boxes"] - expected.pred_boxes).abs().max()) < 1e-5
    torch.testing.assert_close(found["scores"], expected.logits, atol=1e-4, rtol=0)
    assert bool((example.chosen(candidates, 12)["reference"] > 15).all()) == border
    outside = candidates["boxes"][:, first.valid[0, :, 0] == 0]
    assert torch.equal(outside, torch.ones_like(outside)), "as of transformers' anchors, which are infinite there"


def test_rt_detr_becomes_two_engines_that_are_compared_together(rt_detr, photos, tmp_path, monkeypatch, capsys):
    path, weights = rt_detr
    monkeypatch.delenv("RT_DETR", raising=False)
    example = loaded(path)
    options = ("--recipe", "int8_plain")
    first, report, manifest = engine(path, "small_encoder", tmp_path / "a", *options, "--calib", photos)
    assert (manifest["task"], manifest["boxes"]["form"], report["engine"]["lost"]) == ("boxes", "centers", [])
    assert {"classes", "corners.layers.2"} <= {*report["float_layers"]}
    assert report["engine"]["fused_attention"] == 1
    assert example.main(["write", str(photos), "--small", "--to", str(tmp_path)]) == 0
    with np.load(tmp_path / "calib.npz") as calib, np.load(tmp_path / "eval.npz") as judged:
        assert {name: each.shape[1:] for name, each in calib.items()} == {
            "memory": (84, 32), "target": (12, 32), "reference": (12, 4), "groups": ()
        }  # fmt: skip
        assert not {*calib["groups"]} & {*judged["groups"]}
        assert len(calib["groups"]) + len(judged["groups"]) == 16
    files = ("--calib", tmp_path / "calib.npz", "--eval", tmp_path / "eval.npz")
    second, report, manifest = engine(path, "small_decoder", tmp_path / "b", *options, *files)
    assert (manifest["task"], manifest["boxes"]["image"], report["engine"]["lost"]) == ("boxes", [64, 64], [])
    assert (report["engine"]["planned"], report["engine"]["fused_attention"]) == (26, 2)
    assert {"classes", "corners.0.layers.2", "places.layers.0"} <= {*report["float_layers"]}
    capsys.readouterr()
    assert example.main(["compare", str(first), str(second), str(photos), "--small"]) == 0
    said = capsys.readouterr().out
    assert "RANDOM WEIGHTS" in said
    assert float(re.search(r"boxes of the float network: AP 0\.\d+, at overlap \.5 ([\d.]+)", said)[1]) > 0.1
    assert example.main(["compare", str(second), str(first), str(photos), "--small"]) == 2
    assert "reads no images: expected the package of the first engine" in capsys.readouterr().err
    monkeypatch.setenv("RT_DETR", str(weights))
    assert example.main(["compare", str(first), str(second), str(photos)]) == 2
    assert "built from other weights" in capsys.readouterr().err


def test_rt_detr_refuses_weights_and_sizes_that_do_not_fit_in_one_line(rt_detr, photos, tmp_path, monkeypatch, capsys):
    path, weights = rt_detr
    example = loaded(path)
    lacking = tmp_path / "lacking"
    shutil.copytree(weights, lacking)
    state = load_file(lacking / "model.safetensors")
    del state["model.enc_score_head.weight"]
    save_file(state, lacking / "model.safetensors", {"format": "pt"})
    for folder, expected in (
        (tmp_path / "absent", "is no folder"),
        (photos, "cannot be read"),
        (lacking, "lacks 1 tensors, such as 'model.enc_score_head.weight'"),
    ):
        monkeypatch.setenv("RT_DETR", str(folder))
        assert example.main(["write", str(photos), "--to", str(tmp_path)]) == 2
        (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("error")]
        assert expected in line
        assert "expected a folder with config.json and model.safetensors" in line
    assert example.main(["write", str(photos), "--most", "-1", "--small"]) == 2
    assert "--most -1: expected 2 or more" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"images of 100 pixels, strides .* do not fit"):
        example.Encoder(example.small(), 100)
