"""The whole pipeline on networks of a user's own with other inputs than one image: ids of text, a latent with its time."""

import json
import re

import numpy as np
import onnx
import pytest

from deploy import cli
from deploy.engine.packaged import runner_of_package
from deploy.verify import verify_package

pytestmark = pytest.mark.slow

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


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x):
        return x + torch.relu(self.conv(x))


class Denoiser(nn.Module):
    """A latent and its time step in, a latent out; what is kept may be told."""

    def __init__(self):
        super().__init__()
        self.stem, self.out = nn.Conv2d(4, 32, 3, 1, 1), nn.Conv2d(32, 4, 3, 1, 1)
        self.time = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 32))
        self.body = nn.Sequential(Residual(32), Residual(32))

    def forward(self, latent, t, kept=None):
        x = self.out(self.body(self.stem(latent) + self.time(t)[:, :, None, None]))
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
def files(tmp_path_factory):
    """A folder with the networks and the samples of each."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "nets.py").write_text(NETS)
    for name, arrays in samples(40).items():
        np.savez(folder / f"{name}.npz", **arrays, groups=np.arange(40) // 2)
    for name, arrays in samples(8, seed=1).items():
        np.savez(folder / f"{name}.eval.npz", **arrays)
    return folder


def engine(files, factory, recipe, calib=None, **options):
    """The exit code of `engine`."""
    command = {
        "module": f"{files / 'nets.py'}:{factory}", "calib": calib or files / f"{factory}.npz", "calib-images": 24, "sm": 89,
        "cache": "off", "out": files / "out", "weights": "random", "batch": 2, "max-batch": 4, "recipe": recipe, **options,
    }  # fmt: skip
    return cli.main(
        ["engine", *(str(word) for key, value in command.items() if value is not None for word in (f"--{key}", value))]
    )


def built(files, factory, recipe, **options):
    """(the folder of a package, its report, its manifest)."""
    assert engine(files, factory, recipe, **options) == 0
    package = files / "out" / f"nets.{factory}-random-weights" / recipe
    report, manifest = (json.loads((package / f"{name}.json").read_text()) for name in ("report", "manifest"))
    return package, report, manifest


def test_a_text_encoder(files, capsys):
    package, report, manifest = built(files, "text", "int8")
    assert "24 samples" in capsys.readouterr().out
    assert cli.main(["verify", package.as_posix()]) == 0, capsys.readouterr().err
    assert manifest["io"]["inputs"] == [
        {"name": "ids", "dtype": "int64", "min": [1, 12], "opt": [2, 12], "max": [4, 12]}
    ]
    assert manifest["task"] == "features"
    assert report["engine"]["int8_gemms"] >= 7
    assert report["fidelity"]["sqnr_db"] > 20
    assert "blocks.0.qkv/MatMul" in manifest["planned_int8_layers"]
    (given,) = onnx.load(package / "model.onnx").graph.input
    assert (given.name, given.type.tensor_type.elem_type) == ("ids", onnx.TensorProto.INT64)
    assert cli.main(["report", package.as_posix()]) == 0, capsys.readouterr().err
    assert " samples of " in package.with_name("int8.report.html").read_text()


def test_a_text_encoder_on_a_cpu(files):
    package, report, _ = built(files, "text", "int8_plain", target="onnxruntime", sm=None)
    assert report["engine"]["executed"]
    assert report["engine"]["lost"] == []
    with np.load(package / "golden.npz") as golden, runner_of_package(package) as run:
        found = run({"ids": golden["input_ids"]})["output"]
        np.testing.assert_allclose(found, golden["simulated_output"], rtol=0, atol=0.05 * np.abs(found).max())


def test_a_latent_with_its_time_and_a_mask(files):
    package, report, manifest = built(files, "denoiser", "int8_qwt_all", eval=files / "denoiser.eval.npz")
    assert [(each["name"], each["dtype"], each["max"]) for each in manifest["io"]["inputs"]] == [
        ("latent", "float16", [4, 4, 8, 8]), ("t", "int64", [4]), ("kept", "bool", [4, 8, 8])
    ]  # fmt: skip
    assert [each["name"] for each in manifest["io"]["outputs"]] == ["output"]
    assert manifest["preprocessing"] is None
    assert report["evaluation"]["count"] == 8
    assert report["fidelity"]["sqnr_db"] > 20
    assert "4 input channels" in report["float_layers"]["stem"]
    assert {"body.0.conv/Conv", "body.1.conv/Conv"} <= {*manifest["planned_int8_layers"]}
    with np.load(package / "golden.npz") as golden:
        assert {name: golden[name].dtype.name for name in golden.files if name.startswith("input_")} == {
            "input_latent": "float32", "input_t": "int64", "input_kept": "bool"
        }  # fmt: skip
    assert verify_package(package) == []


def test_what_is_kept_may_be_left_out_and_the_structure_is_told(files, tmp_path, capsys):
    arrays = samples(4)["denoiser"]
    np.savez(tmp_path / "few.npz", t=arrays["t"], latent=arrays["latent"])
    argv = ["structure", "--module", f"{files / 'nets.py'}:denoiser", "--calib", str(tmp_path / "few.npz"), "--json"]
    assert cli.main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"body.0.conv", "body.1.conv"} <= {*found["quantized"]}
    assert "one position per sample" in found["float"]["time.1"]
    assert [block["name"] for block in found["blocks"]] == ["body.0", "body.1"]


TEXT, LATENT = samples(4)["text"], samples(4)["denoiser"]
REFUSED = {
    "wrong name": ("text", {"idz": TEXT["ids"]}, {}, "Text takes no input 'idz'.* Did you mean 'ids'"),
    "missing array": ("denoiser", {"latent": LATENT["latent"]}, {}, "Denoiser needs an input 't'"),
    "another number of samples": ("denoiser", {**LATENT, "t": LATENT["t"][:3]}, {}, "different numbers of samples .*t 3"),
    "NaN": ("denoiser", {**LATENT, "latent": LATENT["latent"] * np.nan}, {}, "nan in row 0 of 'latent'"),
    "ids beyond the embedding": ("text", {"ids": TEXT["ids"] + 1}, {}, r"'words' has 40 rows and is asked for row 40: "),
    "negative ids": ("text", {"ids": TEXT["ids"] - 39}, {}, r"asked for row -\d+: expected ids from 0 to 39"),
    "doubles": ("denoiser", {**LATENT, "latent": LATENT["latent"].astype(float)}, {}, "'latent', float64 of shape"),
    "other tokens": ("text", {"ids": TEXT["ids"][:, :7]}, {}, r"Text cannot read ids int64 \(N, 7\) \(RuntimeError: "),
    "INPUT= beside arrays": ("denoiser", LATENT, {"input": "32"}, "Denoiser cannot read images of 3x32x32 .*leave it out"),
    "a folder to judge on": ("text", TEXT, {"eval": "."}, "expected a .npz file with an array for every input .ids int64"),
    "other arrays to judge on": ("text", TEXT, {"eval": "denoiser"}, "holds no 'ids': expected ids int64 .N, 12."),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_input_is_one_line(files, tmp_path, capsys, case):
    factory, arrays, options, message = REFUSED[case]
    np.savez(tmp_path / "data.npz", **arrays)
    options = {key: files / "denoiser.npz" if value == "denoiser" else value for key, value in options.items()}
    assert engine(files, factory, "int8_plain", tmp_path / "data.npz", **options) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.match(f"error: .*{message}", line), line


def test_ids_that_only_images_to_judge_on_have_are_refused_too(files, tmp_path, capsys):
    np.savez(tmp_path / "more.npz", ids=samples(4, seed=2)["text"]["ids"] + 1)
    assert engine(files, "text", "int8_plain", eval=tmp_path / "more.npz") == 2
    assert "'words' has 40 rows" in capsys.readouterr().err


IDLE = """

class Idle(Text):
    def forward(self, ids, t):
        return Text.forward(self, ids)
"""


def test_an_input_that_nothing_reads_is_refused(tmp_path, capsys):
    (tmp_path / "nets.py").write_text(NETS + IDLE)
    np.savez(tmp_path / "Idle.npz", **TEXT, t=LATENT["t"])
    assert engine(tmp_path, "Idle", "int8_plain") == 2
    assert "Idle does not use its input 't'" in capsys.readouterr().err
