"""Folds BatchNorm and LayerScale into the preceding layer: y = g (W x + b) + o has W' = g W and b' = g b + o.

    BatchNorm:     g = gamma / sqrt(var + eps)        o = beta - g mean
    LayerScale:    g = gamma                          o = 0

No TensorRT INT8 convolution has a BatchNorm behind it, and scales must be computed on the weights that the engine runs.
"""

import copy
import time
from dataclasses import replace

import torch
from timm.layers import LayerScale
from torch import Tensor, nn

from calib.modules import replace_module
from calib.quant_model import QuantModel, StageRecord
from calib.quantizer import QMAX, SMALLEST_SCALE

AFFINE = (nn.BatchNorm2d, LayerScale)
# A LayerScale can make rows of a weight too small for an FP16 scale. They do not matter beside a row this many times larger.
SMALL_ROWS = 64


def gain_and_offset(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """(g, o), both (C,), of a module that computes g x + o per channel; None for any other module.

    Raises ValueError for a BatchNorm without running statistics.
    """
    if isinstance(module, LayerScale):
        return module.gamma.detach(), torch.zeros_like(module.gamma)
    if not isinstance(module, nn.BatchNorm2d):
        return None
    mean, var = module.running_mean, module.running_var
    if mean is None or var is None:
        raise ValueError("a BatchNorm without running statistics cannot be folded")
    gain = torch.rsqrt(var + module.eps)
    if module.weight is not None:
        gain = gain * module.weight.detach()
    return gain, -gain * mean if module.bias is None else module.bias.detach() - gain * mean


def fold_into(layer: nn.Module, gain: Tensor, offset: Tensor) -> None:
    """Make a Linear or Conv2d return gain y + offset instead of y; `gain` and `offset` are (out,) (edits `layer`)."""
    weight, bias = layer.get_parameter("weight").detach(), getattr(layer, "bias", None)
    layer.weight = nn.Parameter(weight * gain.reshape(-1, *[1] * (weight.ndim - 1)))
    layer.bias = nn.Parameter(offset if bias is None else offset + gain * bias.detach())


def leaves_scales(layer: nn.Module, gain: Tensor) -> bool:
    """Whether the scale of the largest row of gain W is at least SMALL_ROWS times the smallest FP16 scale."""
    rows = layer.get_parameter("weight").detach().flatten(1).abs().amax(1) * gain.abs()
    return float(rows.max()) / QMAX >= SMALL_ROWS * SMALLEST_SCALE


def affine_pairs(net: nn.Module, example: Tensor) -> dict[str, str]:
    """Name of an affine module -> name of the layer whose output it reads, found by a forward pass of `example`."""
    producer: dict[int, str] = {}
    pairs: dict[str, str] = {}
    alive: list[Tensor] = []  # references to all outputs, so that no id is used twice
    hooks = []

    def after_layer(name: str):
        def hook(_module, _inputs, output):
            producer[id(output)] = name
            alive.append(output)

        return hook

    def before_affine(name: str):
        def hook(_module, inputs):
            if id(inputs[0]) in producer:
                pairs[name] = producer[id(inputs[0])]

        return hook

    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            hooks.append(module.register_forward_hook(after_layer(name)))
        elif isinstance(module, AFFINE):
            hooks.append(module.register_forward_pre_hook(before_affine(name)))
    try:
        with torch.no_grad():
            net(example)
    finally:
        for hook in hooks:
            hook.remove()
    return pairs


def _remainder(module: nn.Module) -> nn.Module:
    """The module that replaces a folded one: the activation of timm's BatchNormAct2d, else an Identity."""
    act = getattr(module, "act", None)
    return act if isinstance(act, nn.Module) else nn.Identity()


def fold_affine(model: QuantModel, example: Tensor) -> QuantModel:
    """`model` with every BatchNorm and LayerScale folded into the preceding layer; `example` is (1, 3, H, W).

    A LayerScale is kept if it is so small that FP16 could not hold the scales of the folded weight.
    """
    start = time.perf_counter()
    net = copy.deepcopy(model.net)
    pairs = affine_pairs(net, example)
    folded = []
    for name, layer in pairs.items():
        found = gain_and_offset(net.get_submodule(name))
        assert found is not None
        if isinstance(net.get_submodule(name), nn.BatchNorm2d) or leaves_scales(net.get_submodule(layer), found[0]):
            fold_into(net.get_submodule(layer), *found)
            replace_module(net, name, _remainder(net.get_submodule(name)))
            folded.append(name)
    notes = tuple(
        f"{sum(isinstance(model.net.get_submodule(name), kind) for name in folded)} of {total} {kind.__name__}s folded"
        for kind in AFFINE
        if (total := sum(isinstance(module, kind) for module in model.net.modules()))
    )
    record = StageRecord("fold", {}, time.perf_counter() - start, notes=notes or ("nothing to fold",))
    net.requires_grad_(False)
    return replace(model, net=net, exact_net=net).with_record(record)
