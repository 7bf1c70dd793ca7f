"""The examples of whole tasks in docs/examples, at small sizes: what docs/models.md says of them is what they do."""

import importlib.util
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deploy import cli
from deploy.verify import verify_package
from tests.docs.pages import ROOT

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "docs/examples"


def smaller(folder, name, *changes):
    """A copy of an example in `folder` with other sizes: pairs of what stands there and what takes its place."""
    text = (EXAMPLES / name).read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    (folder / name).write_text(text)
    return folder / name


def loaded(path):
    """The module in a file."""
    spec = importlib.util.spec_from_file_location(f"{path.stem}_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def engine(path, factory, folder, *options):
    """(the folder of the package, its report, its manifest) of the command that docs/models.md names."""
    argv = [
        "engine", "--module", f"{path}:{factory}", "--weights", "random", "--target", "tensorrt_rtx", "--sm", "89",
        "--batch", "1", "--max-batch", "4", "--cache", "off", "--out", str(folder / "out"), *map(str, options),
    ]  # fmt: skip
    assert cli.main(argv) == 0
    (found,) = (folder / "out").rglob("manifest.json")
    assert verify_package(found.parent) == []
    return found.parent, json.loads((found.parent / "report.json").read_text()), json.loads(found.read_text())


DIT = ('"side": 32, "patch": 2, "width": 1152, "depth": 28, "heads": 16, "classes": 1000',
       '"side": 8, "patch": 2, "width": 64, "depth": 2, "heads": 2, "classes": 10')  # fmt: skip


@pytest.fixture(scope="module")
def dit_file(tmp_path_factory):
    """The example with a network of two blocks; it finds the tool where this test does."""
    return smaller(tmp_path_factory.mktemp("dit"), "dit.py", DIT, ("Path(__file__).parents[2]", f"'{ROOT}'"))


def test_dit_is_calibrated_over_its_steps_and_compared_by_step_and_sample(dit_file, tmp_path, capsys):
    dit = loaded(dit_file)
    assert dit.main(["write", "--samples", "10", "--steps", "5", "--to", str(tmp_path)]) == 0
    with np.load(tmp_path / "calib.npz") as calib, np.load(tmp_path / "eval.npz") as judged:
        assert {*calib["timestep"]} == {0, 200, 400, 600, 800}
        assert not {*calib["groups"]} & {*judged["groups"]}
        assert 10 in calib["class_label"], "guidance asks for no class too"
    files = ("--calib", tmp_path / "calib.npz", "--eval", tmp_path / "eval.npz", "--calib-images", 16)
    package, report, manifest = engine(dit_file, "DiT", tmp_path, "--recipe", "int8_plain", *files)
    assert [(each["name"], each["dtype"]) for each in manifest["io"]["inputs"]] == [
        ("latent", "float16"), ("timestep", "int64"), ("class_label", "int64")
    ]  # fmt: skip
    assert report["engine"]["int8_gemms"] == 8
    assert {"blocks.0.adaLN_modulation.1", "t_embedder.mlp.2"} <= {*report["float_layers"]}
    assert report["fidelity"]["sqnr_db"] > 30
    capsys.readouterr()
    assert dit.main(["compare", str(package), "--weights", "random", "--samples", "2", "--steps", "5"]) == 0
    told = capsys.readouterr().out
    by_step = [float(decibels) for decibels in re.findall(r"step +\d+: .* ([\d.]+) dB", told)]
    assert len(by_step) == 5
    assert min(by_step) > 30
    assert "RANDOM WEIGHTS" in told
    assert re.search(r"2 samples, 5 DDIM steps, guidance 1.5: SQNR [\d.]+ dB, PSNR", told)
    save_file(dit.DiT().state_dict(), tmp_path / "others.safetensors")
    assert dit.main(["compare", str(package), "--weights", str(tmp_path / "others.safetensors")]) == 2
    assert "made of other weights" in capsys.readouterr().err


def test_ddim_gives_back_the_latent_whose_noise_is_known(dit_file):
    """If the noise in x_t = sqrt(a) x_0 + sqrt(1 - a) e is told exactly at every step, the sample is x_0."""
    dit = loaded(dit_file)
    random = np.random.default_rng(0)
    clean, label = random.normal(size=(3, 4, 8, 8)), np.arange(3)
    left = np.array(
        [np.prod([1 - (1e-4 + (0.02 - 1e-4) * each / 999) for each in range(step + 1)]) for step in range(1000)]
    )

    def exact(latent, timestep, class_label):
        share = left[timestep][:, None, None, None]
        wrong = (class_label == 10)[:, None, None, None]  # without a class it is told half of the noise
        return (latent - np.sqrt(share) * clean) / np.sqrt(1 - share) * np.where(wrong, 0.5, 1)

    first = np.sqrt(left[980]) * clean + np.sqrt(1 - left[980]) * random.normal(size=clean.shape)
    x, y, found = dit.sampled(exact, exact, first, label, 50, 1.0)
    np.testing.assert_allclose(x, clean, atol=1e-4)
    np.testing.assert_array_equal(x, y)
    assert list(found) == list(range(980, -1, -20))
    assert dit.guided(exact, first, 980, label, 1.5) == pytest.approx(1.25 * exact(first, np.full(3, 980), label))


def of_diffusers(net):
    """The state of diffusers' DiTTransformer2DModel that computes what `net` does."""
    ours, width = net.state_dict(), net.pos_embed.shape[-1]
    parts = {
        "pos_embed.proj": "x_embedder.proj",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
    }
    found = {}
    for index in range(len(net.blocks)):
        theirs, own = f"transformer_blocks.{index}", f"blocks.{index}"
        parts |= {
            f"{theirs}.norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
            f"{theirs}.norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
            f"{theirs}.norm1.linear": f"{own}.adaLN_modulation.1", f"{theirs}.attn1.to_out.0": f"{own}.attn.proj",
            f"{theirs}.ff.net.0.proj": f"{own}.mlp.fc1", f"{theirs}.ff.net.2": f"{own}.mlp.fc2",
        }  # fmt: skip
        found[f"{theirs}.norm1.emb.class_embedder.embedding_table.weight"] = ours["y_embedder.embedding_table.weight"]
        for kind in ("weight", "bias"):
            for which, part in zip("qkv", ours[f"{own}.attn.qkv.{kind}"].split(width), strict=True):
                found[f"{theirs}.attn1.to_{which}.{kind}"] = part
    found |= {f"{theirs}.{kind}": ours[f"{own}.{kind}"] for theirs, own in parts.items() for kind in ("weight", "bias")}
    return {name: value.clone() for name, value in found.items()}


def test_weights_of_diffusers_get_the_authors_names(dit_file, tmp_path, capsys):
    dit = loaded(dit_file)
    net = dit.DiT()
    save_file(of_diffusers(net), tmp_path / "theirs.safetensors")
    assert dit.main(["convert", str(tmp_path / "theirs.safetensors"), str(tmp_path / "ours.safetensors")]) == 0
    found = dit.load_file(tmp_path / "ours.safetensors")
    assert found.keys() == net.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in net.state_dict().items())
    assert dit.main(["convert", str(tmp_path / "ours.safetensors"), str(tmp_path / "again.safetensors")]) == 2
    assert "expected diffusers'" in capsys.readouterr().err.splitlines()[-1]


BAD_LATENTS = {
    "no labels": ({"latents": np.zeros((4, 4, 8, 8))}, "labels is not a file in the archive.*expected a .npz with latents"),
    "another size": ({"latents": np.zeros((4, 4, 9, 9)), "labels": np.zeros(4, int)}, r"has latents \(4, 4, 9, 9\)"),
    "other classes": ({"latents": np.zeros((4, 4, 8, 8)), "labels": np.full(4, 10)}, "labels from 10 to 10: expected"),
    "one latent": ({"latents": np.zeros((1, 4, 8, 8)), "labels": np.zeros(1, int)}, "at least two latents"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LATENTS)
def test_latents_that_dit_cannot_read_are_one_line(dit_file, tmp_path, capsys, case):
    arrays, message = BAD_LATENTS[case]
    np.savez(tmp_path / "latents.npz", **arrays)
    command = ["write", "--latents", str(tmp_path / "latents.npz"), "--to", str(tmp_path)]
    assert loaded(dit_file).main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: .*{message}", line), line


def test_the_file_of_dit_is_a_script(dit_file):
    done = subprocess.run([sys.executable, dit_file, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "{write,compare,convert}" in done.stdout
