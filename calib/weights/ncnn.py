"""Reads the weights of ncnn: a .bin file without names, whose order is that of the layers."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

FLOAT16_WEIGHTS = 0x01306B47  # what ncnn writes in front of weights that it keeps in float16


def _layers(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers with weights in the order of the file, which is that of the modules."""
    return ((name, each) for name, each in net.named_modules() if isinstance(each, nn.Conv2d | nn.PReLU))


def weights_from_ncnn(blob: bytes, net: nn.Module) -> dict[str, Tensor]:
    """The state dict of `net`, read from the .bin file of ncnn: float16 weights, float32 biases and slopes, in a row.

    Raises ValueError if the file holds more or less than that.
    """
    at, state = 0, {}

    def numbers(count: int, dtype: str) -> np.ndarray:
        nonlocal at
        size = count * np.dtype(dtype).itemsize
        if at + size > len(blob):
            raise ValueError(f"the file ends after {len(blob)} bytes, {at + size} or more were expected")
        found = np.frombuffer(blob, dtype, count, at)
        at += -(-size // 4) * 4  # ncnn fills up to whole words
        return found.astype(np.float32)

    for name, layer in _layers(net):
        weight = layer.get_parameter("weight")
        if isinstance(layer, nn.Conv2d):
            tag = int.from_bytes(blob[at : at + 4], "little")
            at += 4
            if tag != FLOAT16_WEIGHTS:
                raise ValueError(f"the weights of '{name}' are not float16 (tag {tag:#x})")
            state[f"{name}.weight"] = torch.from_numpy(numbers(weight.numel(), "<f2").reshape(weight.shape))
            state[f"{name}.bias"] = torch.from_numpy(numbers(layer.get_parameter("bias").numel(), "<f4"))
        else:
            state[f"{name}.weight"] = torch.from_numpy(numbers(weight.numel(), "<f4"))
    if at != len(blob):
        raise ValueError(f"the file holds {len(blob)} bytes, {at} were expected")
    return state
