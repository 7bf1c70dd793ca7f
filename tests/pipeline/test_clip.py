"""CLIP by docs/examples: the text tower becomes an engine, and two packages are judged by classes that texts name."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from calib.errors import UserError
from deploy import cli
from deploy.measure.onnx_runner import OnnxRunner
from docs.examples import clip_zero_shot

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parents[2] / "docs/examples"
CLASSES = ["cat", "dog", "car", "tree"]
LETTERS = [*map(chr, range(97, 123)), *",.'-"]
WORDS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
END, LENGTH = len(WORDS) - 1, 32
COMMON = ["--target", "tensorrt_rtx", "--sm", "89", "--batch", "2", "--max-batch", "4", "--cache", "off"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with a tiny CLIP and a tokenizer that knows letters alone; beside it the prompts of four classes."""
    place = tmp_path_factory.mktemp("clip")
    # OpenAI's configuration too names 2 as its end token: transformers then takes the largest id of a text
    text = {
        "vocab_size": len(WORDS), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": LENGTH, "bos_token_id": END - 1, "eos_token_id": 2,
        "projection_dim": 48,
    }  # fmt: skip
    vision = {
        "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
        "projection_dim": 48,
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=48)
    transformers.CLIPModel(config).save_pretrained(place / "clip")
    tokenizer = transformers.CLIPTokenizer(vocab={word: index for index, word in enumerate(WORDS)}, merges=[])
    tokenizer.save_pretrained(place / "clip")
    (place / "classes.txt").write_text("\n".join(CLASSES))
    done = example("clip_text.py", place, "classes.txt")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("prompts.npz: 32 prompts of 4 classes; clip.json: logit scale 14.28")
    return place


def example(name, place, *words, folder="clip"):
    """Run an example as a program in the folder `place`."""
    from os import environ

    command, variables = (
        [sys.executable, str(EXAMPLES / name), *map(str, words)],
        environ | {"CLIP_FOLDER": str(place / folder)},
    )
    return subprocess.run(command, cwd=place, env=variables, capture_output=True, text=True, check=False)


def built(place, monkeypatch, *words):
    """The exit code of `engine` on the text tower of the folder."""
    monkeypatch.setenv("CLIP_FOLDER", str(place / "clip"))
    command = ["engine", "--module", f"{EXAMPLES / 'clip_text.py'}:Text", "--recipe", "int8_plain", *COMMON]
    return cli.main([*command, "--out", str(place / "out"), *map(str, words)])


def test_prompts_end_with_the_end_token(clip):
    with np.load(clip / "prompts.npz") as found:
        ids, groups = found["input_ids"], found["groups"]
    assert (ids.dtype, ids.shape) == (np.int64, (32, LENGTH))
    assert (ids[:, 0] == END - 1).all()
    assert (ids == END).any(1).all()
    assert groups.tolist() == [index // 8 for index in range(32)]
    assert json.loads((clip / "clip.json").read_text())["classes"] == CLASSES


def test_the_text_tower_becomes_an_engine(clip, monkeypatch, capsys):
    pytest.importorskip("tensorrt_rtx")
    assert built(clip, monkeypatch, "--calib", clip / "prompts.npz", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    package = clip / "out/clip_text.Text/int8_plain"
    manifest = json.loads((package / "manifest.json").read_text())
    assert manifest["task"] == "features"
    assert manifest["io"]["inputs"] == [
        {"name": "input_ids", "dtype": "int64", "min": [1, LENGTH], "opt": [2, LENGTH], "max": [4, LENGTH]}
    ]
    assert report["engine"]["lost"] == []
    assert (
        len(manifest["planned_int8_layers"]) == 12
    )  # q, k, v, out, fc1, fc2 of two blocks; the projection stays float
    ids = np.load(clip / "prompts.npz")["input_ids"][:4]
    net = transformers.CLIPModel.from_pretrained(clip / "clip").eval()
    with torch.no_grad():
        expected = net.text_projection(net.text_model(input_ids=torch.from_numpy(ids)).pooler_output).numpy()
    found = OnnxRunner(package / "model.fp32.onnx")({"input_ids": ids})
    assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)


WRONG = {
    "the ids of another tokenizer": (lambda ids: ids + 1, r"token_embedding' has \d+ rows and is asked for row \d+"),
    "longer texts": (lambda ids: np.pad(ids, ((0, 0), (0, 8))), r"Text cannot read input_ids int64 \(N, 40\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_ids_of_another_tokenizer_and_longer_texts_are_one_line(clip, monkeypatch, tmp_path, capsys, case):
    change, said = WRONG[case]
    np.savez(tmp_path / "wrong.npz", input_ids=change(np.load(clip / "prompts.npz")["input_ids"]))
    assert built(clip, monkeypatch, "--calib", tmp_path / "wrong.npz") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.match(f"error: .*{said}", last), last


def test_a_missing_folder_and_missing_classes_are_one_line(clip, tmp_path):
    shutil.copy(clip / "classes.txt", tmp_path)
    for words, said in ((["classes.txt"], "CLIP_FOLDER='"), (["nothing.txt"], "expected the path of a text file")):
        done = example("clip_text.py", tmp_path, *words)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert said in done.stderr


def test_without_a_folder_the_weights_are_random_and_it_is_said():
    code = "import clip_text; print(sum(each.numel() for each in clip_text.Text().parameters()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=EXAMPLES, capture_output=True, text=True, check=True)
    assert "CLIP_FOLDER is not set: the text tower has random weights" in done.stderr
    assert int(done.stdout) > 60e6  # as CLIP ViT-B/32's


NET = """
import timm


def image():
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 48}
    net = timm.create_model("vit_base_patch32_clip_quickgelu_224", **small)
    net.num_classes = 0
    return net
"""


@pytest.fixture(scope="module")
def towers(clip):
    """(package of a tiny image tower, package of the text tower), and a folder of pictures in four classes."""
    pytest.importorskip("tensorrt_rtx")
    (clip / "nets.py").write_text(NET)
    random = np.random.default_rng(0)
    for index in range(20):
        folder = clip / "photos" / CLASSES[index % 4]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 40, 3), np.uint8)).save(folder / f"{index}.png")
    command = ["engine", "--module", f"{clip / 'nets.py'}:image", "--weights", "random", "--input", "32", *COMMON]
    command += ["--recipe", "int8_plain", "--calib", f"{clip / 'photos'}", "--out", f"{clip / 'out'}"]
    assert cli.main(command) == 0
    with pytest.MonkeyPatch.context() as patch:
        assert built(clip, patch, "--calib", clip / "prompts.npz", "--out", clip / "again") == 0
    return clip / "out/nets.image-random-weights/int8_plain", clip / "again/clip_text.Text/int8_plain"


@pytest.mark.usefixtures("towers")  # which make the photos
def test_the_short_name_becomes_an_engine(clip, monkeypatch, capsys):
    """`make engine MODEL=clip_b32_image` with two narrow blocks in the place of twelve."""
    create = timm.create_model
    small = {"embed_dim": 48, "depth": 2, "num_heads": 3}
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: create(*args, **options, **small))
    command = ["engine", "--model", "clip_b32_image", "--weights", "random", "--calib", f"{clip / 'photos'}", *COMMON]
    assert cli.main([*command, "--recipe", "int8_plain", "--out", f"{clip / 'out'}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["engine"]["int8_gemms"] == 8
    manifest = json.loads((clip / "out/clip_b32_image-random-weights/int8_plain/manifest.json").read_text())
    assert manifest["task"] == "features"
    assert manifest["io"]["outputs"][0]["opt"] == [2, 512]
    assert manifest["preprocessing"]["resize_height"] == 224


def judged(place, monkeypatch, *words):
    monkeypatch.setenv("CLIP_FOLDER", str(place / "clip"))
    files = ["--prompts", place / "prompts.npz", "--clip", place / "clip.json"]
    return clip_zero_shot.main([*map(str, (*words, *files))])


def test_two_packages_are_judged_by_classes_that_texts_name(clip, towers, monkeypatch, capsys):
    assert json.loads((towers[0] / "manifest.json").read_text())["task"] == "features"
    capsys.readouterr()
    assert judged(clip, monkeypatch, *towers, clip / "photos") == 0
    first, *rows, last = capsys.readouterr().out.splitlines()
    assert first == "20 images, 32 prompts of 4 classes"
    found = [
        re.findall(r"(float|images in INT8|both in INT8): top-1 (.*)%, same class (.*)%, same prompt (.*)%", row)
        for row in rows
    ]
    assert [row[0][0] for row in found] == ["float", "images in INT8", "both in INT8"]
    assert [float(value) for value in found[0][0][2:]] == [100, 100]
    assert all(float(value) > 50 for row in found for value in row[0][2:])
    cosines = re.fullmatch(r"cosine to float: images (.*), prompts (.*)", last).groups()
    assert all(0.99 < float(value) <= 1 for value in cosines)


def test_images_without_classes_are_judged_by_agreement_alone(clip, towers, monkeypatch, capsys):
    capsys.readouterr()
    assert judged(clip, monkeypatch, *towers, clip / "photos/cat") == 0
    assert "top-1" not in (said := capsys.readouterr().out)
    assert said.startswith("5 images")


def test_what_does_not_fit_together_is_one_line(clip, towers, monkeypatch, tmp_path):
    (tmp_path / "photos/horse").mkdir(parents=True)
    shutil.copy(clip / "photos/cat/0.png", tmp_path / "photos/horse")
    image, text = towers
    (tmp_path / "empty").mkdir()
    for words, said in (
        ((image, text, tmp_path / "photos"), "has the subfolder 'horse': expected the classes of clip.json, cat"),
        ((image, text, tmp_path / "empty"), "holds no images"),
        ((text, text, clip / "photos"), "expected the package of an image tower and a folder of images"),
        ((image, image, clip / "photos"), "expected the input of the text tower"),
    ):
        with pytest.raises(UserError, match=said):
            judged(clip, monkeypatch, *words)
    monkeypatch.delenv("CLIP_FOLDER")
    words = [image, text, clip / "photos", "--prompts", clip / "prompts.npz", "--clip", clip / "clip.json"]
    with pytest.raises(UserError, match="was built from other weights"):
        clip_zero_shot.main([*map(str, words)])


def test_classes_are_the_mean_of_their_prompts():
    """Two classes of two prompts in a plane; rounding turns the second image to the other class."""
    texts = np.array([[10, 0], [0.8, 0.6], [0, 1], [-0.6, 0.8]])
    images = np.array([[1.0, 0.2], [0.1, 1.0]])
    exact = clip_zero_shot.Tower(images, images[:, ::-1])
    found = clip_zero_shot.table(exact, clip_zero_shot.Tower(texts, texts), np.array([0, 0, 1, 1]), np.array([0, 1]))
    assert [row["top1"] for row in found] == [1.0, 0.0, 0.0]
    assert [row["same_class"] for row in found] == [1.0, 0.0, 0.0]
    unit = clip_zero_shot.of_classes(texts, np.array([0, 0, 1, 1]))
    np.testing.assert_allclose(unit[0], np.array([1.8, 0.6]) / np.hypot(1.8, 0.6))
