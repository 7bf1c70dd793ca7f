"""Reads the weights of TensorFlow.js: a model.json whose manifest names the tensors, and shards with their bytes in a row.

A converter may store a float tensor in 16 bits, or as unsigned integers q for the values q * scale + min.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, nn

KINDS = {"float32": "<f4", "float16": "<f2", "int32": "<i4", "uint8": "u1", "uint16": "<u2", "bool": "?"}


def _values(entry: Mapping[str, Any], content: bytes, at: int) -> tuple[np.ndarray, int]:
    """Return (the tensor that `entry` describes, which begins at byte `at` of `content`, where the next one begins)."""
    stored = entry.get("quantization", {})
    kind = stored.get("dtype", entry["dtype"])
    if kind not in KINDS:
        raise ValueError(f"'{entry['name']}' has the type {kind}: expected one of {', '.join(KINDS)}")
    count = math.prod(entry["shape"])
    end = at + count * np.dtype(KINDS[kind]).itemsize
    if end > len(content):
        raise ValueError(f"'{entry['name']}' ends at byte {end}, but its shards have {len(content)} bytes together")
    found = np.frombuffer(content, KINDS[kind], count, at).reshape(entry["shape"])
    if "scale" in stored:
        found = found * np.float32(stored["scale"]) + np.float32(stored["min"])
    return found.astype(KINDS[entry["dtype"]]), end


def tensors_from_tfjs(model: bytes, *shards: bytes) -> dict[str, np.ndarray]:
    """The tensors by name, in the order and in the types of the manifest; quantized ones with the values they stand for.

    Args:
        model: the content of model.json.
        shards: the content of the files that its manifest names, in that order.

    Raises:
        ValueError: the manifest names another number of shards, a type that is not read, or other sizes than they have.
    """
    groups, rest, tensors = json.loads(model)["weightsManifest"], list(shards), {}
    named = sum(len(group["paths"]) for group in groups)
    if named != len(shards):
        raise ValueError(f"the manifest names {named} shards, {len(shards)} were given")
    for group in groups:
        content, at = b"".join(rest[: len(group["paths"])]), 0
        del rest[: len(group["paths"])]
        for entry in group["weights"]:
            tensors[entry["name"]], at = _values(entry, content, at)
        if at != len(content):
            raise ValueError(f"the shards {', '.join(group['paths'])} have {len(content)} bytes, {at} were expected")
    return tensors


def convolutions_from_tfjs(net: "nn.Module", layers: Iterable[tuple[np.ndarray, np.ndarray]]) -> "dict[str, Tensor]":
    """The state dict of a `net` of convolutions alone: kernels [h, w, in, out] and biases, in the order of its modules.

    Raises ValueError for another number of layers, or a kernel or bias of another shape.
    """
    import torch

    state = {}
    convs = [(name, each) for name, each in net.named_modules() if isinstance(each, torch.nn.Conv2d)]
    for (name, conv), (kernel, bias) in zip(convs, layers, strict=True):
        state[f"{name}.weight"] = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())  # to [out, in, h, w]
        state[f"{name}.bias"] = torch.from_numpy(bias.copy())
        for kind in ("weight", "bias"):
            given, expected = state[f"{name}.{kind}"].shape, conv.get_parameter(kind).shape
            if given != expected:
                raise ValueError(f"the {kind} of '{name}' is {tuple(given)}, expected {tuple(expected)}")
    return state
