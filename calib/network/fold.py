"""Folds BatchNorm and LayerScale into the preceding layer: y = g (W x + b) + o has W' = g W and b' = g b + o.

    BatchNorm:     g = gamma / sqrt(var + eps)        o = beta - g mean
    LayerScale:    g = gamma                          o = 0

No TensorRT INT8 convolution has a BatchNorm behind it, and scales must be computed on the weights that the engine runs.
What reads a layer's output is taken from the traced network (calib/structure/), so that a layer with a second reader, or one
that is called twice, is left alone.
"""

import copy
import time
from collections.abc import Iterable
from dataclasses import replace

import torch
from timm.layers import LayerScale, LayerScale2d
from torch import Tensor, fx, nn

from calib.modules import replace_module
from calib.quant_model import QuantModel, StageRecord
from calib.quantizer import QMAX, SMALLEST_SCALE
from calib.structure.channels import PRODUCTS, reach_of
from calib.structure.layers import plain_calls
from calib.structure.lowering import lowered, merged_branches
from calib.structure.places import absorbing, channel_map
from calib.structure.proof import preserving
from calib.structure.structure import structure_of
from calib.structure.trace import Trace, aten

AFFINE = (nn.BatchNorm1d, nn.BatchNorm2d, LayerScale, LayerScale2d)
SCALES = (LayerScale, LayerScale2d)
# A LayerScale can make rows of a weight too small for an FP16 scale. They do not matter beside a row this many times larger.
SMALL_ROWS = 64


def gain_and_offset(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """(g, o), both (C,), of a module that computes g x + o per channel; None for any other module.

    Raises ValueError for a BatchNorm without running statistics.
    """
    if isinstance(module, SCALES):
        return module.gamma.detach(), torch.zeros_like(module.gamma)
    if not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
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


def _affine_calls(trace: Trace) -> dict[fx.Node, str]:
    """Return the calls of affine modules that are called once and compute nothing else, and their names."""
    found = {}
    for name, nodes in trace.owned.items():
        module = trace.net.get_submodule(name)
        if (
            not isinstance(module, AFFINE)
            or len(nodes) > 1
            or nodes[0].target not in (aten.batch_norm.default, *PRODUCTS)
        ):
            continue
        if isinstance(module, SCALES) or module.running_mean is not None:
            found[nodes[0]] = name
    return found


def affine_pairs(trace: Trace) -> dict[str, str]:
    """Return the name of an affine module -> name of the layer whose whole output it reads and nothing else reads."""
    affine, pairs = _affine_calls(trace), {}
    for node, layer in absorbing(trace, plain_calls(trace)).items():
        reach = reach_of(trace, node, -1 if node.target is aten.linear.default else 1, affine)
        every = tuple(range(len(trace.net.get_parameter(f"{layer}.weight"))))
        if (
            len(reach.readers) == 1
            and reach.linear
            and reach.shifts
            and not reach.fixed
            and channel_map(reach) == every
        ):
            pairs[next(iter(reach.readers))] = layer
    return pairs


def _remainder(module: nn.Module) -> nn.Module:
    """The module that replaces a folded one: the activation of timm's BatchNormAct2d, else an Identity."""
    act = getattr(module, "act", None)
    return act if isinstance(act, nn.Module) else nn.Identity()


def _fold(net: nn.Module, pairs: Iterable[tuple[str, str]]) -> None:
    """Fold these (affine module, layer) (edits `net`)."""
    for name, layer in pairs:
        found = gain_and_offset(net.get_submodule(name))
        assert found is not None
        fold_into(net.get_submodule(layer), *found)
        replace_module(net, name, _remainder(net.get_submodule(name)))


def _foldable(net: nn.Module, name: str, layer: str) -> bool:
    found = gain_and_offset(net.get_submodule(name))
    assert found is not None
    return not isinstance(net.get_submodule(name), SCALES) or leaves_scales(net.get_submodule(layer), found[0])


def fold_affine(model: QuantModel, example: Tensor) -> QuantModel:
    """`model` with plain layers, every BatchNorm and LayerScale folded into the layer before it, and its structure read.

    `example` is (1, 3, H, W). A LayerScale is kept if it is so small that FP16 could not hold the scales of the folded
    weight. Every step is proved on `example`; one that changes the network's output is taken back, and a note says so.
    Raises UserError if `torch.export` cannot trace the network.
    """
    start = time.perf_counter()
    whole, merged = merged_branches(model.net, example)
    trace = Trace(whole, example)
    plain, made_plain = lowered(trace, example)
    if plain is not whole:
        trace = Trace(plain, example)
    pairs = [pair for pair in affine_pairs(trace).items() if _foldable(plain, *pair)]
    kept, refused = preserving(plain, pairs, _fold, example)
    net = copy.deepcopy(plain)
    _fold(net, kept)
    net.requires_grad_(False)
    folded = [name for name, _ in kept]
    notes = tuple(
        f"{sum(isinstance(plain.get_submodule(name), kind) for name in folded)} of {total} {kind.__name__}s folded"
        for kind in AFFINE
        if (total := sum(isinstance(module, kind) for module in plain.modules()))
    )
    taken_back = tuple(
        f"{name} is not folded: in '{layer}' it changes the output by {apart:.1e}" for (name, layer), apart in refused
    )
    structure = structure_of(net, example, None if kept else trace)
    notes = (*(notes or ("nothing to fold",)), *merged, *made_plain, *taken_back, structure.summary())
    record = StageRecord("fold", {}, time.perf_counter() - start, notes=notes)
    return replace(model, net=net, exact_net=net, structure=structure).with_record(record)
