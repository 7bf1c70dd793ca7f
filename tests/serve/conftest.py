"""Packages of tiny networks, the Triton client, and a real server."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from deploy import cli
from tests.pipeline.test_named_inputs import NETS as NAMED
from tests.pipeline.test_named_inputs import samples
from tests.pipeline.test_several_outputs import NETS
from tests.serve.environments import ROOT, SERVE, TRITON, environment, use_client

COMMON = ["--calib-images", "16", "--sm", "89", "--cache", "off", "--recipe", "int8_plain"]


@pytest.fixture(scope="session", autouse=True)
def client():
    """Most of this folder writes configurations with Triton's own protobuf class."""
    use_client()


@pytest.fixture(scope="session")
def triton():
    """The environment of the server."""
    return environment(TRITON)


@pytest.fixture(scope="session")
def serve_python():
    """The Python of an environment as `make serve-repo` makes it: no torch, no ONNX."""
    return environment(SERVE) / "bin/python"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder of small pictures, JPEG and PNG."""
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for index in range(20):
        kind = "jpg" if index % 2 else "png"
        Image.fromarray(generator.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / f"{index:02}.{kind}")
    return folder


def _vit(folder: Path, pictures: Path, seed: int) -> Path:
    """A package of a tiny classifier."""
    pytest.importorskip("tensorrt_rtx")
    import timm
    import torch

    torch.manual_seed(seed)
    state = {name: value.contiguous() for name, value in timm.create_model("test_vit").state_dict().items()}
    save_file(state, folder / "vit.safetensors")
    command = ["engine", "--model", "test_vit", "--weights", str(folder / "vit.safetensors"), "--calib", str(pictures)]
    assert cli.main([*command, *COMMON, "--out", str(folder / "out")]) == 0
    return folder / "out/test_vit/int8_plain"


@pytest.fixture(scope="session")
def package(tmp_path_factory, pictures) -> Path:
    """A package of a tiny classifier."""
    return _vit(tmp_path_factory.mktemp("first"), pictures, 0)


@pytest.fixture(scope="session")
def newer(tmp_path_factory, pictures) -> Path:
    """A package of the same network with other weights, which may replace the first."""
    return _vit(tmp_path_factory.mktemp("second"), pictures, 1)


@pytest.fixture(scope="session")
def detector(tmp_path_factory, pictures) -> Path:
    """A package of a network with three outputs and random weights."""
    pytest.importorskip("tensorrt_rtx")
    folder = tmp_path_factory.mktemp("detector")
    (folder / "nets.py").write_text(NETS)
    command = ["engine", "--module", f"{folder / 'nets.py'}:detector", "--input", "32", "--weights", "random"]
    assert cli.main([*command, "--calib", str(pictures), *COMMON, "--out", str(folder / "out")]) == 0
    return folder / "out/nets.detector-random-weights/int8_plain"


BOXED = """
import torch
from torch import nn

class Boxed(nn.Module):
    boxes = {"form": "corners", "classes": 3, "nms": 0.6}

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 8, 8), nn.Conv2d(16, 16, 1)
        self.scores, self.places = nn.Conv2d(16, 3, 1), nn.Conv2d(16, 4, 1)
        self.pretrained_cfg = {"input_size": (3, 32, 48), "mean": (0.5,) * 3, "std": (0.5,) * 3}
        corners = torch.tensor([[x, y, x + 12.0, y + 12.0] for y in range(0, 32, 8) for x in range(0, 48, 8)])
        self.register_buffer("corners", corners)

    def forward(self, x):
        x = self.second(self.first(x).relu()).relu()
        scores, places = (layer(x).flatten(2).transpose(1, 2) for layer in (self.scores, self.places))
        return {"scores": scores, "boxes": self.corners + places}
"""


@pytest.fixture(scope="session")
def boxed(tmp_path_factory, pictures) -> Path:
    """A package of a tiny detector with random weights."""
    pytest.importorskip("tensorrt_rtx")
    folder = tmp_path_factory.mktemp("boxed")
    (folder / "boxed.py").write_text(BOXED)
    command = ["engine", "--module", f"{folder / 'boxed.py'}:Boxed", "--weights", "random", "--calib", str(pictures)]
    assert cli.main([*command, *COMMON, "--out", str(folder / "out")]) == 0
    return folder / "out/boxed.Boxed-random-weights/int8_plain"


def _named(folder: Path, file: str, text: str, factory: str, samples: dict[str, np.ndarray]) -> Path:
    """A package of a network with named inputs, whose code is `text`."""
    pytest.importorskip("tensorrt_rtx")
    (folder / file).write_text(text)
    np.savez(folder / "calib.npz", **samples)
    command = ["engine", "--module", f"{folder / file}:{factory}", "--weights", "random", "--batch", "2"]
    command += ["--max-batch", "4", "--calib", str(folder / "calib.npz"), *COMMON, "--out", str(folder / "out")]
    assert cli.main(command) == 0
    return folder / f"out/{Path(file).stem}.{factory}-random-weights/int8_plain"


@pytest.fixture(scope="session")
def sentence(tmp_path_factory) -> Path:
    """A package of the sentence encoder in docs/examples, made tiny, with random weights."""
    tiny = "vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128"
    text = (ROOT / "docs/examples/text_network.py").read_text().replace("BertConfig()", f"BertConfig({tiny})")
    return _named(tmp_path_factory.mktemp("sentence"), "text_network.py", text, "Sentence", sentences(24))


@pytest.fixture(scope="session")
def denoiser(tmp_path_factory) -> Path:
    """A package of a network that takes a latent, one number for its time, and a mask, with random weights."""
    return _named(tmp_path_factory.mktemp("denoiser"), "nets.py", NAMED, "denoiser", samples(24)["denoiser"])


def sentences(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Ids and masks of sentences of 4 to 12 tokens, as `sentence` takes them."""
    random = np.random.default_rng(seed)
    mask = (np.arange(12) < random.integers(4, 13, count)[:, None]).astype(np.int64)
    return {"input_ids": random.integers(1, 50, (count, 12)) * mask, "attention_mask": mask}


@pytest.fixture(scope="session")
def for_cpu(tmp_path_factory, package) -> Path:
    """The package as TARGET=onnxruntime makes it of the same graph, as far as a server reads it."""
    import onnx

    from deploy.engine.backends import onnxruntime
    from deploy.engine.build import Profile

    folder = tmp_path_factory.mktemp("for cpu") / "int8"
    shutil.copytree(package, folder)
    built = onnxruntime.build(onnx.load(folder / "model.fp32.onnx"), Profile(), None)
    (folder / "model.engine").write_bytes(built.plan)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["engine"] |= {"backend": built.backend, "targets": list(built.targets)}
    digest = hashlib.sha256(built.plan).hexdigest()
    manifest["files"]["model.engine"] = {"sha256": digest, "bytes": len(built.plan)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def changed(tmp_path):
    """Make a copy of a package with other fields in its manifest; dots lead into tables."""
    made = []

    def change(package: Path, **fields) -> Path:
        folder = tmp_path / f"changed-{len(made)}"
        made.append(folder)
        shutil.copytree(package, folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        for at, value in fields.items():
            *tables, last = at.split("__")
            inner = manifest
            for table in tables:
                inner = inner[table]
            inner[last] = value
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    return change


@pytest.fixture
def engine(changed, package):
    """Make a package whose manifest says that TensorRT built its engine for `target`, and that it was run."""

    def make(target: str = "SM89", base: Path = package) -> Path:
        made = {"engine__backend": "tensorrt", "engine__version": "10.14.1.48", "engine__executed": True}
        return changed(base, engine__targets=[target], **made)

    return make
