"""The examples of networks of the user's own: what docs/inputs.md shows goes through the tool."""

import json

import numpy as np
import pytest

from deploy import cli
from tests.docs.pages import ROOT

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "docs/examples"
TINY = "hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=32, patch_size=8"


@pytest.fixture
def transformers_file(tmp_path):
    """The example with a network that takes seconds."""
    text = (EXAMPLES / "transformers_network.py").read_text()
    tiny = text.replace("ViTConfig(", f"ViTConfig({TINY}, ").replace("224, 224", "32, 32").replace("1000", "10")
    (tmp_path / "transformers_network.py").write_text(tiny)
    return tmp_path / "transformers_network.py"


def structure_of(capsys, *argv):
    assert cli.main(["structure", "--json", *argv]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_network_of_torchvision_is_read_and_folded(capsys):
    found = structure_of(capsys, "--module", f"{EXAMPLES}/torchvision_network.py:build", "--input", "64")
    assert {"features.1.block.0.0", "classifier.3"} <= {*found["quantized"], *found["float"]}
    assert len(found["blocks"]) >= 6
    assert found["places"]


def test_the_network_of_transformers_is_read_and_folded(transformers_file, capsys):
    found = structure_of(capsys, "--module", f"{transformers_file}:Logits")
    assert "net.vit.layers.0.mlp.fc1" in found["quantized"]
    assert [block["name"] for block in found["blocks"]] == ["net.vit.layers.0", "net.vit.layers.1"]


def test_the_network_of_transformers_becomes_an_engine(transformers_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = np.random.default_rng(0).integers(0, 256, (24, 40, 40, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(24) % 10, groups=np.arange(24) // 2)
    argv = [
        "engine", "--module", f"{transformers_file}:Logits", "--weights", "random", "--recipe", "int8_plain",
        "--target", "tensorrt_rtx", "--sm", "89", "--calib-images", "8", "--batch", "1", "--max-batch", "4",
        "--calib", str(tmp_path / "images.npz"), "--eval", str(tmp_path / "images.npz"), "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    assert cli.main([*argv, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["engine"]["int8_gemms"] >= 8
    assert report["fidelity"]["top1"] is not None
    assert any("or their group, are calibration images" in line for line in report["warnings"])
    folder = next((tmp_path / "out").glob("*/int8_plain"))
    assert json.loads((folder / "manifest.json").read_text())["weights"]["module"]["sha256"]
    same = ["--module", f"{transformers_file}:Logits", "--weights", "random", "--recipe", "int8_plain"]
    assert cli.main(["verify", *same, "--out", str(tmp_path / "out")]) == 0


def test_the_sentence_encoder_becomes_an_engine(tmp_path, capsys):
    tiny = "vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128"
    text = (EXAMPLES / "text_network.py").read_text().replace("BertConfig()", f"BertConfig({tiny})")
    (tmp_path / "text_network.py").write_text(text)
    random = np.random.default_rng(0)
    mask = (np.arange(12) < random.integers(4, 13, 24)[:, None]).astype(np.int64)
    np.savez(tmp_path / "data.npz", input_ids=random.integers(1, 50, (24, 12)) * mask, attention_mask=mask)
    argv = [
        "engine", "--module", f"{tmp_path}/text_network.py:Sentence", "--weights", "random", "--recipe", "int8_plain",
        "--target", "tensorrt_rtx", "--sm", "89", "--calib-images", "16", "--batch", "1", "--max-batch", "4",
        "--calib", str(tmp_path / "data.npz"), "--out", str(tmp_path / "out"), "--cache", "off", "--json",
    ]  # fmt: skip
    assert cli.main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["engine"]["int8_gemms"] >= 8
    assert report["fidelity"]["sqnr_db"] > 30
    (manifest,) = (tmp_path / "out").rglob("manifest.json")
    inputs = json.loads(manifest.read_text())["io"]["inputs"]
    assert [(each["name"], each["dtype"]) for each in inputs] == [("input_ids", "int64"), ("attention_mask", "int64")]


def test_an_object_with_the_logits_inside_is_a_named_output(transformers_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    transformers_file.write_text(transformers_file.read_text().replace(".logits", ""))
    argv = [
        "engine", "--module", f"{transformers_file}:Logits", "--weights", "random", "--recipe", "int8_plain",
        "--sm", "89", "--calib-images", "8", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    assert cli.main(argv) == 0, capsys.readouterr().err
    (path,) = (tmp_path / "out").rglob("manifest.json")
    manifest = json.loads(path.read_text())
    assert manifest["task"] == "classifier"
    assert [each["name"] for each in manifest["io"]["outputs"]] == ["logits"]
