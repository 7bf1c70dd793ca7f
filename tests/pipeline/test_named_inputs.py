"""The whole pipeline on networks of a user's own with other inputs than one image: ids of text, a latent with its time."""

import json

import numpy as np
import onnx
import pytest

from deploy import cli
from deploy.verify import verify_package

pytest.importorskip("tensorrt_rtx")

NETS = '''
import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        packed = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Text(nn.Module):
    """As CLIP reads text: the embedding at the end token, the largest id, is what comes out."""

    def __init__(self, words=40, width=32, tokens=12):
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Parameter(torch.randn(tokens, width))
        self.blocks = nn.ModuleList([Block(width, 2) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 16)

    def forward(self, ids):
        x = self.words(ids) + self.places
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x[torch.arange(x.shape[0], device=x.device), ids.argmax(-1)])


class Denoiser(nn.Module):
    """A latent and its time step in, a latent out; what is kept may be told."""

    def __init__(self):
        super().__init__()
        self.stem, self.out = nn.Conv2d(4, 32, 3, 1, 1), nn.Conv2d(32, 4, 3, 1, 1)
        self.time = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 32))
        self.body = nn.ModuleList([nn.Conv2d(32, 32, 3, 1, 1) for _ in range(2)])

    def forward(self, latent, t, kept=None):
        x = self.stem(latent) + self.time(t)[:, :, None, None]
        for layer in self.body:
            x = x + torch.relu(layer(x))
        x = self.out(x)
        return x if kept is None else x * kept[:, None]


def text():
    torch.manual_seed(0)
    return Text()


def denoiser():
    torch.manual_seed(0)
    return Denoiser()
'''


def samples(count, seed=0):
    random = np.random.default_rng(seed)
    ids = random.integers(1, 39, (count, 12))
    ids[np.arange(count), random.integers(3, 12, count)] = 39
    latent = random.normal(size=(count, 4, 8, 8)).astype(np.float32)
    more = {"t": random.integers(0, 50, count), "kept": random.random((count, 8, 8)) < 0.8}
    return {"text": {"ids": ids}, "denoiser": {**more, "latent": latent}}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build a package of a network with a recipe; returns its folder."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "nets.py").write_text(NETS)
    for name, arrays in samples(40).items():
        np.savez(folder / f"{name}.npz", **arrays, groups=np.arange(40) // 2)
    for name, arrays in samples(8, seed=1).items():
        np.savez(folder / f"{name}.eval.npz", **arrays)

    def run(factory, recipe, *more):
        command = [
            "engine", "--module", f"{folder / 'nets.py'}:{factory}", "--calib", str(folder / f"{factory}.npz"),
            "--calib-images", "24", "--sm", "89", "--cache", "off", "--out", str(folder / "out"), "--weights", "random",
            "--batch", "2", "--max-batch", "4", "--recipe", recipe, *more,
        ]  # fmt: skip
        assert cli.main(command) == 0
        return folder / "out" / f"nets.{factory}-random-weights" / recipe

    return run


def read(package):
    return (json.loads((package / f"{name}.json").read_text()) for name in ("report", "manifest"))


def test_a_text_encoder(built, capsys):
    package = built("text", "int8")
    assert cli.main(["verify", package.as_posix()]) == 0, capsys.readouterr().err
    report, manifest = read(package)
    assert manifest["io"]["inputs"] == [{"name": "ids", "dtype": "int64", "min": [1, 12], "opt": [2, 12], "max": [4, 12]}]
    assert manifest["task"] == "features"
    assert report["engine"]["int8_gemms"] >= 7
    assert report["fidelity"]["sqnr_db"] > 20
    assert "blocks.0.qkv/MatMul" in manifest["planned_int8_layers"]
    (given,) = onnx.load(package / "model.onnx").graph.input
    assert (given.name, given.type.tensor_type.elem_type) == ("ids", onnx.TensorProto.INT64)


def test_a_latent_with_its_time_and_a_mask(built, capsys):
    package = built("denoiser", "int8_qwt_all", "--eval", str(built.__closure__[0].cell_contents / "denoiser.eval.npz"))
    report, manifest = read(package)
    assert [(each["name"], each["dtype"], each["max"]) for each in manifest["io"]["inputs"]] == [
        ("latent", "float16", [4, 4, 8, 8]), ("t", "int64", [4]), ("kept", "bool", [4, 8, 8])
    ]  # fmt: skip
    assert manifest["preprocessing"] is None
    assert report["evaluation"]["count"] == 8
    assert report["fidelity"]["sqnr_db"] > 20
    assert "4 input channels" in report["float_layers"]["stem"]
    with np.load(package / "golden.npz") as golden:
        assert {name: golden[name].dtype.name for name in golden.files if name.startswith("input_")} == {
            "input_latent": "float32", "input_t": "int64", "input_kept": "bool"
        }  # fmt: skip
    assert verify_package(package) == []
    capsys.readouterr()
