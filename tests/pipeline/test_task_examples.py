"""The examples of whole tasks in docs/examples, at small sizes: what docs/models.md says of them is what they do."""

import importlib.util
import json
import re
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
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


FITTED_AT_THE_LAST_STEP = """description = "int8_plain with branches as QwT fits them"
[calibrate]
observer = "percentile"
[method]
name = "rtn"
[compensate]
only_input = "timestep"
only_value = 0
min_r2_per_kernel = 0.0
"""


def test_dit_is_calibrated_over_its_steps_and_compared_by_step_and_sample(dit_file, tmp_path, capsys):
    dit = loaded(dit_file)
    assert dit.main(["write", "--samples", "10", "--steps", "5", "--to", str(tmp_path)]) == 0
    with np.load(tmp_path / "calib.npz") as calib, np.load(tmp_path / "eval.npz") as judged:
        assert {*calib["timestep"]} == {0, 200, 400, 600, 800}
        assert not {*calib["groups"]} & {*judged["groups"]}
        assert 10 in calib["class_label"], "guidance asks for no class too"
    files = ("--calib", tmp_path / "calib.npz", "--eval", tmp_path / "eval.npz")
    (tmp_path / "last_step.toml").write_text(FITTED_AT_THE_LAST_STEP)
    package, report, manifest = engine(dit_file, "DiT", tmp_path, "--recipe", tmp_path / "last_step.toml", *files)
    assert [(each["name"], each["dtype"]) for each in manifest["io"]["inputs"]] == [
        ("latent", "float16"), ("timestep", "int64"), ("class_label", "int64")
    ]  # fmt: skip
    assert report["engine"]["int8_gemms"] >= 8
    (details,) = (stage["details"] for stage in report["history"] if stage["stage"] == "qwt")
    samples = {each["samples"] for several in details["tried"].values() for each in several}
    assert samples == {8 * 16}  # tokens of the latents that calibrate, at one step of five
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


DECODERS = (
    ("TOKENS = 64", "TOKENS = 12"), ('"vocab_size": 1000, "hidden_size": 256', '"vocab_size": 50, "hidden_size": 64'),
    ('"intermediate_size": 512', '"intermediate_size": 96'), ('"ffn_dim": 512', '"ffn_dim": 96'),
    ('"num_hidden_layers": 4', '"num_hidden_layers": 2'), ('"word_embed_proj_dim": 256', '"word_embed_proj_dim": 64'),
    ("Path(__file__).parents[2]", f"'{ROOT}'"),
)  # fmt: skip
LINEAR_LAYERS = {"Llama": 7, "OPT": 6}  # of a decoder block


@pytest.fixture(scope="module")
def decoders_file(tmp_path_factory):
    """The example with networks of two blocks."""
    return smaller(tmp_path_factory.mktemp("decoders"), "decoder_blocks.py", *DECODERS)


@pytest.mark.parametrize("factory", ["LlamaPrefill", "OPTPrefill", "LlamaStep", "OPTStep"])
def test_a_language_model_computes_all_its_linear_layers_in_int8(decoders_file, tmp_path, capsys, monkeypatch, factory):
    monkeypatch.delenv("DECODER", raising=False)
    module = loaded(decoders_file)
    assert module.main(["write", factory, "--samples", "30", "--to", str(tmp_path)]) == 0
    files = ("--calib", tmp_path / "calib.npz", "--eval", tmp_path / "eval.npz", "--calib-images", 16)
    package, report, manifest = engine(decoders_file, factory, tmp_path, "--recipe", "int8_plain", *files)
    blocks = 2 * LINEAR_LAYERS[factory.removesuffix("Prefill").removesuffix("Step")]
    assert (len(manifest["planned_int8_layers"]), report["engine"]["lost"]) == (blocks, [])
    assert {*report["float_layers"]} == {"net.lm_head"}
    assert report["fidelity"]["sqnr_db"] > 25
    names = {kind: [each["name"] for each in manifest["io"][kind]] for kind in ("inputs", "outputs")}
    if factory.endswith("Step"):
        assert names["inputs"] == ["input_ids", "attention_mask", "keys", "values"]
        assert names["outputs"] == ["logits", "new_keys", "new_values"]
    else:
        assert manifest["task"] == "tokens"
        assert report["fidelity"]["top1_kind"] == "next token"
        assert report["fidelity"]["top1_agreement"] > 0.8
    capsys.readouterr()
    assert module.main(["compare", str(package), str(tmp_path / "eval.npz"), "--weights", "random"]) == 0
    told = capsys.readouterr().out
    assert "RANDOM WEIGHTS" in told
    places = 6 if factory.endswith("Step") else 72
    assert re.search(rf"next token the same as float's: \d+\.\d% of {places} places", told)
    assert ("perplexity: float " in told) == factory.endswith("Prefill")


@pytest.mark.parametrize("name", ["Llama", "OPT"])
def test_steps_behind_a_past_tell_what_the_whole_text_does(decoders_file, monkeypatch, name):
    monkeypatch.delenv("DECODER", raising=False)
    module = loaded(decoders_file)
    torch.manual_seed(0)
    step = module.FACTORIES[f"{name}Step"]().eval()
    ids = np.random.default_rng(0).integers(0, 50, (3, 12))
    given = {key: torch.from_numpy(array) for key, array in module.step_arrays(step, ids).items()}
    with torch.no_grad():
        found = step(**given)
        whole = module.Prefill.forward(step, torch.from_numpy(ids), torch.ones(3, 12, dtype=torch.int64))
        longer = module.step_arrays(step, np.concatenate([ids, ids[:, :1]], 1))
    torch.testing.assert_close(found["logits"], whole[:, -1], atol=1e-5, rtol=1e-4)
    for which in ("keys", "values"):
        added = torch.cat([given[which], found[f"new_{which}"]], 3)
        torch.testing.assert_close(added, torch.from_numpy(longer[which]), atol=1e-5, rtol=1e-4)


BAD_IDS = {
    "no file": (None, "cannot be read"),
    "another type": (np.zeros((4, 12), np.int32), r"holds int32 \(4, 12\): expected int64 \(N, 12\)"),
    "other tokens": (np.zeros((4, 9), np.int64), r"holds int64 \(4, 9\)"),
    "beyond the vocabulary": (np.full((4, 12), 50), "holds ids from 50 to 50: expected"),
}


@pytest.mark.parametrize("case", BAD_IDS)
def test_ids_that_the_network_cannot_read_are_one_line(decoders_file, tmp_path, capsys, case):
    ids, message = BAD_IDS[case]
    if ids is not None:
        np.save(tmp_path / "ids.npy", ids)
    command = ["write", "OPTPrefill", "--ids", str(tmp_path / "ids.npy"), "--to", str(tmp_path)]
    assert loaded(decoders_file).main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: .*{message}", line), line


DEPTH = (
    ("SIDE = 518", "SIDE = 56"), ("LAYERS = (3, 6, 9, 12)", "LAYERS = (1, 2, 3, 4)"),
    ('"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6',
     '"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2'),
    ('384, "neck_hidden_sizes": [48, 96, 192, 384], "fusion_hidden_size": 64',
     '64, "neck_hidden_sizes": [16, 16, 32, 32], "fusion_hidden_size": 16'),
)  # fmt: skip


def test_depth_anything_becomes_an_engine(tmp_path, monkeypatch):
    monkeypatch.delenv("DEPTH", raising=False)
    path = smaller(tmp_path, "depth_anything.py", *DEPTH)
    images = np.random.default_rng(0).integers(0, 256, (24, 60, 60, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    files = ("--calib", tmp_path / "images.npz", "--calib-images", 8)
    _, report, manifest = engine(path, "Depth", tmp_path, "--recipe", "int8_plain", *files)
    assert manifest["task"] == "values"
    assert (len(manifest["planned_int8_layers"]), report["engine"]["lost"]) == (53, [])
    assert report["engine"]["int8_gemms"] >= 16
    assert "transposed convolution" in report["float_layers"]["net.neck.reassemble_stage.layers.0.resize"]
    assert report["fidelity"]["sqnr_db"] > 15


@pytest.mark.parametrize(
    ("name", "side", "layers", "blocks"),
    [("dinov3_s", 64, 48, 12), ("siglip_b", 32, 52, 12), ("sam2_hiera_t", 128, 51, 12)],
)
def test_encoders_by_name_quantize_all_but_their_first_layer(capsys, name, side, layers, blocks):
    """At their own sizes the numbers are the same; tests/contract/test_families.py takes small ones to engines."""
    assert cli.main(["structure", name, "--input", str(side), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (len(found["quantized"]), len(found["blocks"])) == (layers, blocks)
    assert {*found["float"]} - {"attn_pool.q"} == {"patch_embed.proj"}


TERRAIN = ("SIDE, WIDTHS, DEPTH, EMBEDDED, HEAD = 128, (32, 32, 64, 96, 128), 4, 128, 32",
           "SIDE, WIDTHS, DEPTH, EMBEDDED, HEAD = 16, (32, 64), 1, 32, 32")  # fmt: skip


def terrain_package(folder, text):
    """Write what the package of PyPI has of weights, random here, into `folder`; the network and layers they are of."""
    module = loaded(text)
    states = {}
    module.load = lambda net, time: states.update(net=net, time=time)
    net = module.Terrain()
    time = states["time"]
    generator = torch.Generator().manual_seed(0)
    held, nodes = {}, []
    every = net.state_dict() | {f"time_embed.{name}": value for name, value in time.state_dict().items()}
    for name, value in every.items():
        value.copy_(torch.randn(value.shape, generator=generator) / 8)
        held[f"network.{name}"] = value.numpy()
    norms = [(name, each) for name, each in net.named_modules() if isinstance(each, torch.nn.GroupNorm)]
    for index, (name, _) in enumerate(norms):  # their names are lost
        for kind, which in (("weight", "scale"), ("bias", "shift")):
            held[f"{which}{index}"] = held.pop(f"network.{name}.{kind}")[:, None, None]
        chain = [f"{each}{index}" for each in "abcd"]
        nodes += [
            helper.make_node("InstanceNormalization", ["x", "one", "nil"], [chain[0]]),
            helper.make_node("Reshape", [chain[0], "shape"], [chain[1]]),
            helper.make_node("Mul", [chain[1], f"scale{index}"], [chain[2]]),
            helper.make_node("Add", [chain[2], f"shift{index}"], [chain[3]]),
        ]
    graph = helper.make_graph(
        nodes, "unet", [], [], [numpy_helper.from_array(value, name) for name, value in held.items()]
    )
    file = folder / module.PACKAGE / module.WEIGHTS
    file.parent.mkdir(parents=True)
    (folder / module.PACKAGE / "__init__.py").write_text("raise SystemExit('code of the package was run')")
    onnx.save(helper.make_model(graph), file)
    return net, time


def test_the_denoiser_has_the_weights_of_its_package_and_is_judged_on_other_noise(tmp_path, monkeypatch, capsys):
    path = smaller(tmp_path, "terrain.py", TERRAIN)
    monkeypatch.chdir(tmp_path)
    terrain = loaded(path)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda _name: None)
        with pytest.raises(SystemExit, match=r"first: .venv/bin/pip install --no-deps adaptive-terrain-diffusion"):
            terrain.weights()
    monkeypatch.syspath_prepend(tmp_path)
    net, time = terrain_package(tmp_path, path)
    found = terrain.Terrain()
    for name, value in net.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    angles = 250 * np.log(80) * 10000.0 ** (-np.arange(16) / 16)
    waves = torch.tensor(np.concatenate([np.cos(angles), np.sin(angles)]), dtype=torch.float32)
    torch.testing.assert_close(found.time[0], time(waves))
    terrain.main()
    assert "noise.npz: 128 samples" in capsys.readouterr().out
    files = ("--calib", "noise.npz", "--eval", "other_noise.npz", "--calib-images", 16, "--recipe", "int8_plain")
    _, report, manifest = engine(path, "Terrain", tmp_path, *files, "--float", "fp32")
    assert [each["name"] for each in manifest["io"]["inputs"]] == ["noise", "difficulty"]
    assert report["fidelity"]["sqnr_db"] > 20
    assert report["engine"]["planned"] == report["engine"]["int8_convs"] > 20
    assert report["floats"] == "fp32"
