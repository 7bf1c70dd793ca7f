"""Detectors by the commands of docs/models.md, at small sizes."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import torchvision
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
    smaller(folder, "faster_rcnn.py", ("REGIONS = 100", "REGIONS = 16"))
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


def reading_as_is(net):
    """`net` without torchvision's own preparation of the images, and with the masks that its heads draw, not pasted."""
    net.transform.min_size, net.transform.max_size = (224,), 224
    net.transform.image_mean, net.transform.image_std = [0, 0, 0], [1, 1, 1]
    net.transform.postprocess = lambda result, *_: result
    return net


@pytest.fixture(scope="module")
def mask_proposals(masks, photos, tmp_path_factory):
    """(package, report, manifest) of the first engine of `masks`."""
    path, weights = masks
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASK_RCNN", str(weights))
        options = ("--weights", "auto", "--recipe", "int8_plain", "--calib", photos)
        return engine(path, "Proposals", tmp_path_factory.mktemp("proposals"), *options)


def test_the_parts_of_mask_rcnn_are_torchvisions_network(masks, monkeypatch):
    path, weights = masks
    monkeypatch.setenv("MASK_RCNN", str(weights))
    example, image = loaded(path), torch.rand(1, 3, 224, 224)
    net = reading_as_is(example.whole())
    with torch.no_grad():
        (expected,) = net(list(image))
        first = example.Proposals().eval()
        (found,) = example.detect(net, image, first, example.Regions().eval())
        drawn = example.masks_of(net, first(image), found["boxes"], found["labels"], example.Masks().eval())
    assert len(expected["scores"]) > 5
    for name in ("boxes", "scores", "labels"):
        torch.testing.assert_close(found[name], expected[name])
    assert torch.equal(drawn, expected["masks"][:, 0] > 0.5)


def test_mask_rcnn_becomes_three_engines_that_are_compared_together(
    masks, mask_proposals, photos, tmp_path, monkeypatch, capsys
):
    path, weights = masks
    monkeypatch.setenv("MASK_RCNN", str(weights))
    example, options = loaded(path), ("--weights", "auto", "--recipe", "int8_plain")
    first, report, manifest = mask_proposals
    assert (manifest["task"], manifest["boxes"]["classes"], report["engine"]["lost"]) == ("boxes", 1, [])
    assert example.main(["write", str(photos), "--regions", "2", "--to", str(tmp_path)]) == 0
    second, report, _ = engine(path, "Regions", tmp_path / "b", *options, "--calib", tmp_path / "regions.npz")
    assert report["engine"]["int8_gemms"] == 2
    third, report, _ = engine(path, "Masks", tmp_path / "c", *options, "--calib", tmp_path / "masks.npz")
    assert report["engine"]["planned"] == 4
    capsys.readouterr()
    assert example.main(["compare", str(first), str(second), str(third), str(photos)]) == 0
    said = capsys.readouterr().out
    assert "boxes of the float network: AP 0." in said
    assert "boxes of the float network: overlap 0." in said


@pytest.fixture(scope="module")
def cascade(masks):
    """The example with the backbone of `masks`, and the file of its weights: those of `masks` and others in the heads."""
    path, weights = masks
    path = smaller(path.parent, "cascade_rcnn.py", ("HIDDEN = 1024", "HIDDEN = 64"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CASCADE_RCNN", raising=False)
        net = loaded(path).whole()
    shared = {name: each for name, each in torch.load(weights).items() if not name.startswith("roi_heads.")}
    assert not net.load_state_dict(shared, strict=False).unexpected_keys
    torch.save(net.state_dict(), path.parent / "cascade.pth")
    return path, path.parent / "cascade.pth"


def as_mmdetection_computes(net, features, boxes):
    """(boxes (n, 4), scores, labels) in an image of 224 x 224, from the proposals, by the formulas of its CascadeRoIHead."""
    spreads = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
    logits = 0
    for stage, spread in zip(net.roi_heads.stages, spreads, strict=True):
        regions = stage.box_roi_pool(features, [boxes], [(224, 224)])
        scores, offsets = stage.box_predictor(stage.box_head(regions))
        assert offsets.shape == (len(boxes), 4)
        logits = logits + scores / 3
        offsets = offsets * torch.tensor(spread)
        size = boxes[:, 2:] - boxes[:, :2]
        centre, size = boxes[:, :2] + size / 2 + offsets[:, :2] * size, size * offsets[:, 2:].exp()
        boxes = torch.cat([centre - size / 2, centre + size / 2], 1).clamp(0, 224)
    scores = logits.softmax(1)[:, 1:]
    rows, classes = (scores > 0.05).nonzero().T
    kept = torchvision.ops.batched_nms(boxes[rows], scores[rows, classes], classes, 0.5)[:100]
    return boxes[rows][kept], scores[rows, classes][kept], classes[kept] + 1


def test_the_parts_of_cascade_rcnn_are_its_whole_network(cascade, monkeypatch):
    path, weights = cascade
    monkeypatch.setenv("CASCADE_RCNN", str(weights))
    example, image = loaded(path), torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    net = reading_as_is(example.whole())
    parts = [getattr(example, name)().eval() for name in ("Proposals", "First", "Second", "Third", "Masks")]
    with torch.no_grad():
        (expected,) = net(list(image))
        proposed = parts[0](image)
        found = example.detect(net, proposed, parts[1:4])
        maps, proposals = example.maps_of(proposed), example.proposals_of(net, proposed, (224, 224))
        regions = net.roi_heads.mask_roi_pool(maps, [found["boxes"]], [(224, 224)])
        drawn = parts[4](regions)[torch.arange(len(regions)), found["labels"]]
        stages = [torch.sigmoid(each.mask_predictor(each.mask_head(regions))) for each in net.roi_heads.stages]
        written = as_mmdetection_computes(net, maps, proposals[0])
    assert len(expected["scores"]) > 5
    for name, by_hand in zip(("boxes", "scores", "labels"), written, strict=True):
        torch.testing.assert_close(found[name], expected[name])
        torch.testing.assert_close(found[name], by_hand, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(drawn, expected["masks"][:, 0])
    torch.testing.assert_close(drawn, (sum(stages) / 3)[torch.arange(len(drawn)), found["labels"]])


def test_cascade_rcnn_becomes_five_engines_that_are_compared_together(
    cascade, mask_proposals, photos, tmp_path, monkeypatch, capsys
):
    """Its first engine is that of mask_rcnn.py: `compare` finds that it has the weights of this network, too."""
    path, weights = cascade
    monkeypatch.setenv("CASCADE_RCNN", str(weights))
    example, two = loaded(path), tmp_path / "two"
    two.mkdir()
    for name in ("0.png", "1.png"):
        shutil.copy(photos / name, two)
    assert example.main(["write", str(photos), "--regions", "1", "--to", str(tmp_path)]) == 0
    packages = [mask_proposals[0]]
    for name, layers in (("First", 5), ("Second", 5), ("Third", 5), ("Masks", 12)):
        calib, judged = (tmp_path / f"{name.lower()}_{use}.npz" for use in ("calib", "eval"))
        with np.load(calib) as one, np.load(judged) as other:
            assert one["regions"].shape[1:] == ((32, 14, 14) if name == "Masks" else (32, 7, 7))
            assert {*one["groups"]} | {*other["groups"]} == {*range(16)}
            assert {*other["groups"]} == {0, 5, 10, 15}
        options = ("--weights", "auto", "--recipe", "int8_plain", "--calib", calib, "--eval", judged)
        package, report, manifest = engine(path, name, tmp_path / name, *options)
        assert (report["engine"]["planned"], report["engine"]["lost"]) == (layers, [])
        assert [each["name"] for each in manifest["io"]["inputs"]] == ["regions"]
        packages.append(package)
    capsys.readouterr()
    assert example.main(["compare", *map(str, packages), str(two)]) == 0
    said = capsys.readouterr().out
    assert float(re.search(r"boxes of the float network: AP 0\.\d+, at overlap \.5 ([\d.]+)", said)[1]) > 0.5
    assert float(re.search(r"boxes of the float network: overlap ([\d.]+)", said)[1]) > 0.9
    assert "RANDOM" not in said
    monkeypatch.delenv("CASCADE_RCNN")
    assert example.main(["compare", *map(str, packages), str(two)]) == 2
    said = capsys.readouterr()
    assert "RANDOM WEIGHTS" in said.out
    assert "built from other weights" in said.err


@pytest.mark.parametrize("variable", ["MASK_RCNN", "CASCADE_RCNN"])
def test_weights_that_do_not_fit_are_refused_in_one_line(
    masks, cascade, photos, tmp_path, monkeypatch, capsys, variable
):
    path = (masks if variable == "MASK_RCNN" else cascade)[0]
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "empty.pth").touch()
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    example = loaded(path)
    for name in ("absent.pth", "text.pth", "empty.pth", "other.pth"):
        monkeypatch.setenv(variable, str(tmp_path / name))
        assert example.main(["write", str(photos), "--to", str(tmp_path)]) == 2
        (line,) = [each for each in capsys.readouterr().err.splitlines() if each.strip()]
        assert f"{variable}={tmp_path / name} cannot be read" in line
        assert "expected a file with the state dict of the example's whole()" in line


def test_cascade_rcnn_says_which_file_would_be_empty(cascade, photos, tmp_path, monkeypatch, capsys):
    path, weights = cascade
    monkeypatch.setenv("CASCADE_RCNN", str(weights))
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(photos / "0.png", alone)
    assert loaded(path).main(["write", str(alone), "--to", str(tmp_path)]) == 2
    assert "0 images of" in (said := capsys.readouterr().err)
    assert "are for first_calib.npz" in said


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
