import argparse
import datetime
import http.server
import re
import threading
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import close_session
from safetensors.torch import save_file
from torch import nn

from calib.errors import UserError
from calib.outputs import outputs_from, task_of
from calib.weights import load as weights
from calib.weights.load import _check_tensors, load_net, state_sha256
from calib.weights.state import without_prefixes
from calib.weights.zoo import ZOO, ModelSpec, resolve_model

VIT = ModelSpec("tiny", "test_vit.r160_in1k")
RESNET = ModelSpec("tiny_resnet", "test_resnet.r160_in1k")


def filled_state(tag=VIT.tag, **kwargs):
    """A state dict whose every value differs from what any seed gives."""
    generator = torch.Generator().manual_seed(7)
    state = timm.create_model(tag, **kwargs).state_dict()
    return {
        key: torch.rand(value.shape, generator=generator) + 1 if value.is_floating_point() else value
        for key, value in state.items()
    }


def write(path, content):
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def refusal(spec, path):
    with pytest.raises(UserError) as caught:
        load_net(spec, str(path))
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


def assert_same(net, state):
    loaded = net.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


# -- files that load ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_round_trip(tmp_path, suffix):
    state = filled_state()
    loaded = load_net(VIT, str(write(tmp_path / f"net{suffix}", state)))
    assert_same(loaded.net, state)
    assert not loaded.net.training
    assert not loaded.random
    assert loaded.source == f"file {tmp_path}/net{suffix}"
    assert loaded.data_config["input_size"] == (3, 160, 160)


@pytest.mark.parametrize(
    "key",
    ["state_dict_ema", "model_ema", "ema", "state_dict", "model", "model_state_dict", "net", "weights", "student"],
)
def test_wrapper_and_module_prefix_are_taken_off(tmp_path, key):
    state = filled_state()
    content = {"epoch": 3, key: {f"module.{name}": value for name, value in state.items()}}
    loaded = load_net(VIT, str(write(tmp_path / "train.pth", content)))
    assert_same(loaded.net, state)
    assert loaded.source.endswith(f"[{key}] (without 'module.')")


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "backbone.", "0.", "_forward_module.a."],
)
def test_prefixes_of_wrappers_go_in_any_order(tmp_path, prefix):
    state = filled_state()
    content = {f"{prefix}{name}": value for name, value in state.items()} | {"n_averaged": torch.tensor(3)}
    loaded = load_net(VIT, str(write(tmp_path / "compiled.pth", content)))
    assert_same(loaded.net, state)
    assert f"(without '{prefix}')" in loaded.source


@pytest.mark.parametrize(
    ("name", "value", "refused"),
    [
        ("limit", float("inf"), False), ("limit", -float("inf"), False), ("limit", float("nan"), True),
        ("1.running_var", float("inf"), True), ("0.weight", float("inf"), True), ("0.weight", float("nan"), True),
    ],
)  # fmt: skip
def test_a_buffer_may_hold_infinity_and_nothing_else_may(name, value, refused):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    net.register_buffer("limit", torch.ones(()))
    net.state_dict()[name].fill_(value)
    if refused:
        with pytest.raises(UserError, match=rf"NaN or Inf in 1 tensors \({name}\) of here"):
            _check_tensors(net, "here")
    else:
        _check_tensors(net, "here")


def test_a_prefix_that_the_network_has_itself_stays():
    state = {"model.weight": torch.ones(1)}
    assert without_prefixes(state, ["model.weight"]) == (state, "")
    assert without_prefixes(state, ["weight"])[0].keys() == {"weight"}


@pytest.mark.parametrize("name", ["model_best.pth.tar", "net.ckpt", "weights", "net.bin"])
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_the_name_of_a_file_does_not_matter(tmp_path, name, kind):
    state, path = filled_state(), tmp_path / name
    if kind == "torch":
        torch.save({"state_dict": state}, path)
    else:
        save_file(state, path)
    assert_same(load_net(VIT, str(path)).net, state)


def test_harmless_objects_beside_the_weights_are_allowed(tmp_path):
    state = filled_state()
    extra = {
        "args": argparse.Namespace(lr=1e-3, out=Path("runs")), "best": np.float64(0.8), "seen": np.int64(3),
        "when": datetime.datetime(2020, 1, 2), "losses": np.arange(3.0), "more": types.SimpleNamespace(epochs=3),
    }  # fmt: skip
    torch.save({"model": state, **extra}, tmp_path / "train.pth")
    assert_same(load_net(VIT, str(tmp_path / "train.pth")).net, state)


def test_an_empty_average_does_not_hide_the_weights(tmp_path):
    state = filled_state()
    for empty in ({}, {"module.n_averaged": torch.tensor(1)}, None):
        torch.save({"model_ema": empty, "model": state}, tmp_path / "train.pth")
        assert_same(load_net(VIT, str(tmp_path / "train.pth")).net, state)


def test_of_two_networks_in_a_file_the_one_that_fits_is_taken_and_of_equal_ones_none(tmp_path):
    state, path = filled_state(), tmp_path / "train.pth"
    torch.save({"encoder": state, "predictor": {"weight": torch.ones(2)}, "epoch": 1}, path)
    assert load_net(VIT, str(path)).source.endswith("[encoder]")
    torch.save({"student": state, "teacher": state}, path)
    assert "holds several state dicts, student, teacher: save the one that you mean" in refusal(VIT, path)
    torch.save({f"{who}.{key}": value for who in ("student", "teacher") for key, value in state.items()}, path)
    assert "missing" in refusal(VIT, path)


def test_a_network_without_prefix_is_taken_before_a_second_one_under_a_prefix():
    state = {"a.weight": 1, "a.bias": 2}
    teacher = {f"teacher.{name}": value + 10 for name, value in state.items()}
    found, note = without_prefixes({**state, **teacher, "teacher.center": 5, "epoch": 3}, list(state))
    assert found == {**state, "epoch": 3}
    assert "left out: teacher.a.weight" in note
    found, _ = without_prefixes({**teacher, "loss.weight": 1}, list(state))
    assert found == {"a.weight": 11, "a.bias": 12}


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_tensors_without_dense_values_are_named(tmp_path, kind):
    state = filled_state()
    state["head.weight"] = state["head.weight"].to_sparse() if kind == "sparse" else state["head.weight"].to("meta")
    assert "head.weight; expected dense weights" in refusal(VIT, write(tmp_path / "net.pth", state))


def test_integers_in_the_place_of_float_weights_are_refused(tmp_path):
    state = {key: (value * 0).to(torch.int8) for key, value in filled_state().items()}
    assert "holds no float values where the network has float" in refusal(VIT, write(tmp_path / "ints.pth", state))


@pytest.mark.parametrize("classes", [6, 0])
@pytest.mark.parametrize("spec", [VIT, RESNET], ids=lambda spec: spec.name)
def test_the_classes_are_those_of_the_checkpoint(tmp_path, spec, classes):
    torch.manual_seed(3)
    fine_tuned = timm.create_model(spec.tag, num_classes=classes)
    torch.save(fine_tuned.state_dict(), tmp_path / "tuned.pth")
    loaded = load_net(spec, str(tmp_path / "tuned.pth"))
    assert_same(loaded.net, fine_tuned.state_dict())
    assert loaded.source.endswith(", 6 classes" if classes else "without a classifier: features")
    x = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(loaded.net(x), fine_tuned.eval()(x))


@pytest.mark.parametrize("classes", [None, 6])
def test_a_head_that_projects_into_the_space_of_texts_gives_features(tmp_path, classes):
    spec, weights = resolve_model("vit_xsmall_patch16_clip_224.tinyclip_yfcc15m"), "random"
    if classes:  # a classifier that was trained from it
        weights = str(write(tmp_path / "tuned.pth", timm.create_model(spec.tag, num_classes=classes).state_dict()))
    loaded, images = load_net(spec, weights), torch.zeros(1, 3, 224, 224)
    found = loaded.net(images)
    assert found.shape == (1, classes or 512)
    assert task_of(loaded.net, outputs_from({"output": found})).name == ("classifier" if classes else "features")
    assert load_net(VIT, "random").net.num_classes == 1000


def test_clip_reads_images_as_its_authors_did():
    spec = replace(ZOO["clip_b32_image"], tag="vit_xsmall_patch16_clip_224.tinyclip_yfcc15m")
    assert load_net(spec, "random").data_config["crop_pct"] == 1.0
    assert load_net(replace(spec, crop_pct=None), "random").data_config["crop_pct"] == 0.9


def test_other_classes_and_another_difference_are_refused(tmp_path):
    state = timm.create_model(VIT.tag, num_classes=6).state_dict()
    del state["norm.weight"]
    assert "norm.weight" in refusal(VIT, write(tmp_path / "tuned.pth", state))


def test_what_a_training_loop_keeps_beside_the_network_is_left_out_and_said(tmp_path):
    state = filled_state()
    content = {f"model.{name}": value for name, value in state.items()} | {"criterion.weight": torch.ones(5)}
    loaded = load_net(VIT, str(write(tmp_path / "last.ckpt", {"state_dict": content, "hyper_parameters": {"lr": 1}})))
    assert_same(loaded.net, state)
    assert "(left out: criterion.weight)" in loaded.source


def test_fewer_classes_and_other_positions_are_taken_together(tmp_path):
    tuned = timm.create_model(VIT.tag, num_classes=6)
    torch.save(tuned.state_dict(), tmp_path / "tuned.pth")
    loaded = load_net(replace(VIT, img_size=(96, 128)), str(tmp_path / "tuned.pth"))
    assert loaded.net.num_classes == 6
    assert "6 classes" in loaded.source
    assert "resampled pos_embed (1, 101, 64) to (1, 49, 64)" in loaded.source


def test_files_of_other_kinds_are_named(tmp_path):
    for name, kind in {"net.onnx": "an ONNX graph", "a.plan": "a TensorRT engine", "m.h5": "a TensorFlow model",
                       "model.safetensors.index.json": "the index of a checkpoint in several files"}.items():  # fmt: skip
        (tmp_path / name).write_bytes(b"\x08\x0a")
        assert re.search(f"is {kind}, not .*torch.save.net.state_dict.*MODULE=", refusal(VIT, tmp_path / name))
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    assert "is a TorchScript file" in refusal(VIT, tmp_path / "script.pt")
    (tmp_path / "text.pth").write_text("epoch 3: loss 0.2, nothing else")
    assert "cannot be read" in refusal(VIT, tmp_path / "text.pth")


def test_averaged_weights_win_over_raw_ones(tmp_path):
    state = filled_state()
    content = {"state_dict": {key: value * 0 for key, value in state.items()}, "state_dict_ema": state}
    assert_same(load_net(VIT, str(write(tmp_path / "train.pth", content))).net, state)


def test_half_precision_file_becomes_float32(tmp_path):
    half = {key: value.half() for key, value in filled_state().items()}
    net = load_net(VIT, str(write(tmp_path / "half.safetensors", half))).net
    assert_same(net, {key: value.float() for key, value in half.items()})
    assert {value.dtype for value in net.state_dict().values()} == {torch.float32}


def test_old_torchvision_file_without_batch_counters(tmp_path):
    state = filled_state(RESNET.tag)
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert len(old) < len(state)
    assert_same(load_net(RESNET, str(write(tmp_path / "old.pth", old))).net, state)


def test_a_network_that_timm_does_not_have_is_built_by_the_zoo():
    loaded = load_net(ZOO["resnet50_thin"], "random")
    assert loaded.random
    assert loaded.data_config["crop_mode"] == "squash"
    with torch.no_grad():
        assert loaded.net(torch.zeros(1, 3, 224, 224)).shape == (1, 1024)
    with pytest.raises(UserError, match="timm has no pretrained weights for open_nsfw"):
        load_net(ZOO["resnet50_thin"], "pretrained")


def test_official_dinov2_layout_is_converted(tmp_path):
    official = filled_state(ZOO["dinov2_s"].tag)  # 518 pixels: 37x37 positions
    content = {**official, "mask_token": torch.zeros(1, 384)}
    loaded = load_net(ZOO["dinov2_s"], str(write(tmp_path / "dinov2_vits14_pretrain.pth", content)))
    assert "converted" in loaded.source
    assert loaded.data_config["input_size"] == (3, 224, 224)
    state = loaded.net.state_dict()
    assert state["pos_embed"].shape == (1, 1 + 16 * 16, 384)
    assert torch.equal(state["pos_embed"][:, 0], official["pos_embed"][:, 0])
    assert_same(loaded.net, {**official, "pos_embed": state["pos_embed"]})


def jax_arrays(state, depth, heads):
    """The layout of Google's ViT checkpoints, written from their published names."""

    def array(key):
        return state[key].numpy()

    def dense(name, key):
        return {f"{name}/kernel": array(f"{key}.weight").T, f"{name}/bias": array(f"{key}.bias")}

    def norm(name, key):
        return {f"{name}/scale": array(f"{key}.weight"), f"{name}/bias": array(f"{key}.bias")}

    arrays = {
        "cls": array("cls_token"),
        "embedding/kernel": array("patch_embed.proj.weight").transpose(2, 3, 1, 0),
        "embedding/bias": array("patch_embed.proj.bias"),
        "Transformer/posembed_input/pos_embedding": array("pos_embed"),
        **norm("Transformer/encoder_norm", "norm"),
        **dense("head", "head"),
    }
    for n in range(depth):
        block, ours = f"Transformer/encoderblock_{n}", f"blocks.{n}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        width = state[f"{ours}.attn.proj.weight"].shape[0]
        weights_of = np.split(array(f"{ours}.attn.qkv.weight"), 3)
        biases_of = np.split(array(f"{ours}.attn.qkv.bias"), 3)
        for part, weight, bias in zip(("query", "key", "value"), weights_of, biases_of, strict=True):
            arrays[f"{attention}/{part}/kernel"] = weight.T.reshape(width, heads, -1)
            arrays[f"{attention}/{part}/bias"] = bias.reshape(heads, -1)
        arrays[f"{attention}/out/kernel"] = array(f"{ours}.attn.proj.weight").T.reshape(heads, -1, width)
        arrays[f"{attention}/out/bias"] = array(f"{ours}.attn.proj.bias")
        arrays |= norm(f"{block}/LayerNorm_0", f"{ours}.norm1") | norm(f"{block}/LayerNorm_2", f"{ours}.norm2")
        arrays |= dense(f"{block}/MlpBlock_3/Dense_0", f"{ours}.mlp.fc1")
        arrays |= dense(f"{block}/MlpBlock_3/Dense_1", f"{ours}.mlp.fc2")
    return arrays


VIT_TINY = ModelSpec("vit_tiny", "vit_tiny_patch16_224.augreg_in21k_ft_in1k")


def test_jax_npz_loads_exactly_or_not_at_all(tmp_path):
    state = filled_state(VIT_TINY.tag)
    arrays = jax_arrays(state, depth=12, heads=3)
    path = tmp_path / "augreg.npz"
    np.savez(path, **arrays)
    assert_same(load_net(VIT_TINY, str(path)).net, state)

    np.savez(path, **{**arrays, "head/kernel": np.zeros((192, 7)), "head/bias": np.zeros(7)})
    assert "classifier" in refusal(VIT_TINY, path)  # timm alone would leave the head at random

    surplus = np.zeros((1000 - 7) * (192 + 1))  # the count is right again, the head still is not
    np.savez(path, **{**arrays, "head/kernel": np.zeros((192, 7)), "head/bias": np.zeros(7), "x": surplus})
    assert "NaN or Inf in 2 tensors (head.weight, head.bias)" in refusal(VIT_TINY, path)

    renamed = {key.replace("encoderblock_11", "encoderblock_12"): value for key, value in arrays.items()}
    np.savez(path, **renamed)
    assert "encoderblock_11" in refusal(VIT_TINY, path)

    path.write_bytes(path.read_bytes()[:50_000])
    assert "whole .npz" in refusal(VIT_TINY, path)
    assert "vision transformers only" in refusal(RESNET, path)


# -- files that are refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_misfits_are_listed(tmp_path, suffix):
    path = tmp_path / f"net{suffix}"
    state = filled_state()
    blocks = [key for key in state if key.startswith("blocks.0.")]
    assert len(blocks) > 4

    text = refusal(VIT, write(path, {key: value for key, value in state.items() if key not in blocks}))
    assert f"{len(blocks)} missing: {blocks[0]}" in text
    assert f"and {len(blocks) - 3} more" in text
    assert VIT.tag in text

    assert "1 unexpected: extra.weight" in refusal(VIT, write(path, {**state, "extra.weight": torch.ones(2)}))

    text = refusal(VIT, write(path, {**state, "head.bias": torch.ones(7)}))
    assert "1 wrong shape: head.bias (7,) instead of (1000,)" in text


@pytest.mark.parametrize(
    ("key", "tensor"),
    [("patch_embed.proj.weight", torch.ones(64, 3, 32, 32)), ("pre_logits.fc.weight", torch.ones(64, 64))],
)
def test_timm_converter_may_not_change_the_network(tmp_path, key, tensor):
    state = filled_state()
    assert "patch_embed.proj.weight" in state
    assert key in refusal(VIT, write(tmp_path / "net.pth", {**state, key: tensor}))


def test_other_architecture_is_refused(tmp_path):
    assert "missing" in refusal(VIT, write(tmp_path / "net.pth", filled_state(RESNET.tag)))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_truncated_torch_file(tmp_path, legacy):
    path = tmp_path / "net.pth"
    torch.save(filled_state(), path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    for size in (0, 1, 3, 500, 5000, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:size])
        assert "truncated" in refusal(VIT, path)


def test_truncated_safetensors_file(tmp_path):
    path = write(tmp_path / "net.safetensors", filled_state())
    whole = path.read_bytes()
    for size in (7, 500, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "whole safetensors" in refusal(VIT, path)
    path.write_bytes(b"")
    assert "is empty" in refusal(VIT, path)


def test_absent_file_folder_and_unknown_ending(tmp_path):
    assert "no such file" in refusal(VIT, tmp_path / "absent.pth")
    (tmp_path / "folder.pth").mkdir()
    assert "is a folder" in refusal(VIT, tmp_path / "folder.pth")
    with pytest.raises(UserError, match="Did you mean 'pretrained'"):
        load_net(VIT, "pretraind")


class Bomb:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


def test_pickled_code_is_refused_and_not_run(tmp_path):
    path, trace = tmp_path / "net.pth", tmp_path / "ran"
    torch.save({"state_dict": filled_state(), "args": Bomb(trace)}, path)
    assert "refused" in refusal(VIT, path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # the file does carry code that runs


def test_non_state_dicts_are_refused(tmp_path):
    path = tmp_path / "net.pth"
    assert "holds a list" in refusal(VIT, write(path, [torch.ones(2)]))
    assert "epoch" in refusal(VIT, write(path, {"epoch": 3, "weights": torch.ones(2)}))
    assert "no state dict: 0 hold" in refusal(VIT, write(path, {0: torch.ones(2)}))
    assert "missing" in refusal(VIT, write(path, {}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    state = filled_state(RESNET.tag)
    buffer = next(key for key in state if key.endswith("running_var"))
    state[buffer][0] = value
    text = refusal(RESNET, write(tmp_path / "net.pth", state))
    assert f"1 tensors ({buffer})" in text


# -- random weights and the hash ------------------------------------------------------------------------


def test_random_weights_follow_the_seed_and_leave_the_global_generator():
    before = torch.get_rng_state()
    one, again, other = load_net(VIT, "random"), load_net(VIT, "random"), load_net(VIT, "random", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert one.random
    assert one.source == "random weights (seed 0)"
    assert one.sha256 == again.sha256
    assert one.sha256 != other.sha256


def test_hash_depends_on_each_value_and_on_nothing_else(tmp_path):
    state = filled_state()
    path = tmp_path / "net.pth"
    first = load_net(VIT, str(write(path, state))).sha256
    shuffled = dict(reversed(state.items()))
    assert load_net(VIT, str(write(tmp_path / "other_name.pt", shuffled))).sha256 == first
    state["head.bias"][-1] += 1e-3
    assert load_net(VIT, str(write(path, state))).sha256 != first


def test_hash_covers_names():
    layer = torch.nn.Linear(2, 2)
    one, other = torch.nn.ModuleDict({"a": layer}), torch.nn.ModuleDict({"b": layer})
    assert state_sha256(one) != state_sha256(other)


# -- the hub --------------------------------------------------------------------------------------------


@pytest.fixture
def empty_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def hub_refusal(weights_argument="pretrained"):
    with pytest.raises(UserError) as caught:
        load_net(VIT, weights_argument)
    text = str(caught.value)
    assert "\n" not in text
    assert all(way in text for way in ("WEIGHTS=/path/to/", "WEIGHTS=random", "hub access", VIT.tag))


@pytest.mark.usefixtures("empty_hub_cache")
@pytest.mark.parametrize("argument", ["pretrained", "auto"])
def test_unreachable_hub_is_said_at_once(monkeypatch, argument):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    start = time.monotonic()
    hub_refusal(argument)
    assert time.monotonic() - start < 10  # huggingface_hub left alone retries for 46 s
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.usefixtures("empty_hub_cache")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:9"),
        ("https_proxy", "foo:bar"),
        ("HTTP_PROXY", "ftp://x"),
        ("HTTPS_PROXY", "http://user:secret@127.0.0.1:9"),
    ],
)
def test_a_setting_that_keeps_the_hub_away_is_named_without_its_value(monkeypatch, name, value):
    close_session()  # the client reads the proxies when it is made
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"this shell sets .*{name}.*WEIGHTS=random") as caught:
        load_net(VIT, "pretrained")
    close_session()
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.usefixtures("empty_hub_cache")
def test_an_address_that_is_none_is_named(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "nonsense")
    monkeypatch.setenv("HF_ENDPOINT", "nonsense")
    with pytest.raises(UserError, match="this shell sets HF_ENDPOINT"):
        load_net(VIT, "pretrained")


def test_lost_connection_is_a_user_error(monkeypatch):
    def lose_connection(*_args, **_kwargs):
        raise HTTPError("peer closed connection")

    monkeypatch.setattr(weights, "_hub_answers", lambda: True)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lose_connection)
    hub_refusal()


def test_programming_errors_keep_their_traceback(monkeypatch):
    def misuse(*_args, **_kwargs):
        raise TypeError("wrong argument")

    monkeypatch.setattr(weights, "_hub_answers", lambda: True)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", misuse)
    with pytest.raises(TypeError, match="wrong argument"):
        load_net(VIT, "pretrained")


def test_hub_weights_are_loaded_and_named(monkeypatch):
    state = filled_state()
    monkeypatch.setattr(weights, "_hub_answers", lambda: True)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(state))
    loaded = load_net(VIT, "pretrained")
    assert_same(loaded.net, state)
    assert loaded.source == "timm pretrained timm/test_vit.r160_in1k"


def test_model_without_published_weights():
    with pytest.raises(UserError, match="no pretrained weights for vit_giant_patch14_224"):
        load_net(ModelSpec("g", "vit_giant_patch14_224"), "pretrained")


@pytest.mark.parametrize("status", [200, 404, 503])
def test_any_http_answer_counts_as_reachable(monkeypatch, status):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert weights._hub_answers()
        thread.join()
