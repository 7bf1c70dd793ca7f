"""BatchNorm folding: y = gamma (W x + b - mean) / sqrt(var + eps) + beta becomes one convolution.

    g = gamma / sqrt(var + eps)        W' = g W        b' = beta + g (b - mean)

A TensorRT INT8 convolution has no BatchNorm behind it, and scales must be computed on the weights that run.
"""

import copy
import time
from dataclasses import replace

import torch
from torch import Tensor, nn

from calib.modules import replace_module
from calib.quant_model import QuantModel, StageRecord


def folded_weights(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight (out, in/groups, kh, kw) and bias (out,) of the convolution that equals `norm(conv(x))`."""
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        raise ValueError("a BatchNorm without running statistics cannot be folded")
    gamma = torch.ones_like(var) if norm.weight is None else norm.weight.detach()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach()
    bias = torch.zeros_like(mean) if conv.bias is None else conv.bias.detach()
    gain = gamma / torch.sqrt(var + norm.eps)
    return conv.weight.detach() * gain.reshape(-1, 1, 1, 1), beta + gain * (bias - mean)


def conv_norm_pairs(net: nn.Module, example: Tensor) -> dict[str, str]:
    """BatchNorm name -> name of the convolution whose output tensor it reads, found by running `example`."""
    producer: dict[int, str] = {}
    pairs: dict[str, str] = {}
    alive: list[Tensor] = []  # keeps every output referenced, so that no id is used twice
    hooks = []

    def after_conv(name: str):
        def hook(_module, _inputs, output):
            producer[id(output)] = name
            alive.append(output)

        return hook

    def before_norm(name: str):
        def hook(_module, inputs):
            if id(inputs[0]) in producer:
                pairs[name] = producer[id(inputs[0])]

        return hook

    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(after_conv(name)))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(before_norm(name)))
    try:
        with torch.no_grad():
            net(example)
    finally:
        for hook in hooks:
            hook.remove()
    return pairs


def _without_norm(norm: nn.BatchNorm2d) -> nn.Module:
    """What stays of a BatchNorm after folding: timm's BatchNormAct2d carries its activation."""
    act = getattr(norm, "act", None)
    return act if isinstance(act, nn.Module) else nn.Identity()


def fold_batch_norms(model: QuantModel, example: Tensor) -> QuantModel:
    """`model` with every BatchNorm that follows a convolution folded into it; `example` is (1, 3, H, W)."""
    start = time.perf_counter()
    net = copy.deepcopy(model.net)
    pairs = conv_norm_pairs(net, example)
    for norm_name, conv_name in pairs.items():
        conv, norm = net.get_submodule(conv_name), net.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        weight, bias = folded_weights(conv, norm)
        conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
        replace_module(net, norm_name, _without_norm(norm))
    total = sum(isinstance(module, nn.BatchNorm2d) for module in model.net.modules())
    notes = (f"{len(pairs)} of {total} BatchNorms folded into their convolutions",)
    record = StageRecord("fold", {}, time.perf_counter() - start, notes=notes)
    net.requires_grad_(False)
    return replace(model, net=net, exact_net=net).with_record(record)
