"""Lowering at intake: what computes like a layer becomes a plain Linear or Conv2d, with the same output.

    a convolution that pads its input itself ("same" padding)      zero padding, then a convolution without or with padding
    a weight that is computed in the forward pass (standardised)   the weight as it comes out
    a weight that is read outside its module, with a bias of       the module with that bias, called as it is where the
    query and value alone (BEiT, EVA, Swin v2)                     bias is absent
    torch's MultiheadAttention over one tensor                     attention with the layers qkv and proj
    branches that training keeps apart (RepVGG, MobileOne)         one convolution, as the network's own code merges them

Every replacement is proved by the network's output; one that changes it is taken back, and the layer stays in float.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

from timm.utils.model import reparameterize_model
from torch import Tensor, fx, nn

from calib.modules import replace_module
from calib.structure.layers import plain_calls
from calib.structure.proof import MAX_REL_L2, difference, output_of, preserving
from calib.structure.self_attention import SelfAttention
from calib.structure.trace import LAYER_OPERATORS, PADS, Trace, aten, calls, padding_of

CONV = (aten.conv2d.default, aten.conv2d.padding)
Edit = tuple[str, Callable[[nn.Module], None]]  # name of the module, what to do to a copy of the network


def _pair(value: object) -> tuple[int, int]:
    first, second = value if isinstance(value, list | tuple) else (value, value)
    return int(first), int(second)


def _zero_pad(node: fx.Node) -> list[int] | None:
    """Return (left, right, top, bottom) of a padding with zeros; None for anything else."""
    pads, mode, value = padding_of(node)
    return pads if mode == "constant" and not value and len(pads) == 4 and min(pads) >= 0 else None


def _same(size: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Return (left, right, top, bottom) of torch's padding 'same'."""
    total = [step * (length - 1) for length, step in zip(size, dilation, strict=True)]
    (top, bottom), (left, right) = ((each // 2, each - each // 2) for each in total)
    return [left, right, top, bottom]


def _plain_conv(weight: Tensor, bias: Tensor | None, node: fx.Node, pads: Sequence[int]) -> nn.Module:
    """Return a Conv2d like the call `node`, whose input is padded by `pads` (left, right, top, bottom) first."""
    args: Any = [*node.args[3:], *[None] * 4][:4]
    stride, padding, dilation = _pair(args[0] or 1), args[1] or 0, _pair(args[2] or 1)
    groups = int(args[3] or 1)
    if isinstance(padding, str):
        pads, padding = (_same(weight.shape[2:], dilation) if padding == "same" else pads), 0
    left, right, top, bottom = pads
    height, width = _pair(padding)
    if left == right and top == bottom and (not any(pads) or not (height or width)):
        height, width, pads = height + top, width + left, (0, 0, 0, 0)
    conv = nn.Conv2d(
        weight.shape[1] * groups, len(weight), _pair(weight.shape[2:]), stride, (height, width), dilation, groups,
        bias is not None,
    )  # fmt: skip
    conv.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return nn.Sequential(nn.ZeroPad2d(tuple(pads)), conv) if any(pads) else conv  # type: ignore[arg-type]


def _plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return linear


def _own_layer(trace: Trace, name: str, nodes: Sequence[fx.Node]) -> Edit | None:
    """The module `name` computes one convolution or linear, at most with zero padding before it, and nothing else."""
    *before, node = nodes
    if len(before) > 1 or any(each.target not in PADS or node.args[0] is not each for each in before):
        return None
    args: Any = node.args
    weight, bias = args[1], args[2] if len(args) > 2 else None
    if weight not in trace.constants or (bias is not None and bias not in trace.constants):
        return None
    pads = _zero_pad(before[0]) if before else [0, 0, 0, 0]
    values = trace.constant(weight), None if bias is None else trace.constant(bias)
    if node.target is aten.linear.default and not before:
        return name, lambda net: replace_module(net, name, _plain_linear(*values))
    if node.target in CONV and pads is not None:
        return name, lambda net: replace_module(net, name, _plain_conv(*values, node, pads))
    return None


def _split_bias(trace: Trace, node: fx.Node) -> Edit | None:
    """A module reads the weight of its `qkv` with a bias put together from `q_bias` and others."""
    owner, weight = trace.owner(node), trace.parameter(node.args[1])
    bias = node.args[2] if len(node.args) > 2 else None
    if weight is None or bias not in trace.constants or getattr(trace.net.get_submodule(owner), "q_bias", None) is None:
        return None
    layer, value = weight.removesuffix(".weight"), trace.constant(bias)  # type: ignore[arg-type]

    def edit(net: nn.Module) -> None:
        net.get_submodule(layer).bias = nn.Parameter(value.clone(), requires_grad=False)
        setattr(net.get_submodule(owner), "q_bias", None)  # noqa: B010 - no attribute that a Module declares

    return layer, edit


def _self_attention(trace: Trace, node: fx.Node) -> Edit | None:
    """torch's MultiheadAttention whose query, key and value are one tensor: one product with the packed weight."""
    name = trace.owner(node)
    if not isinstance(trace.net.get_submodule(name), nn.MultiheadAttention):
        return None
    if trace.parameter(node.args[1]) != f"{name}.in_proj_weight":
        return None

    def edit(net: nn.Module) -> None:
        attention = net.get_submodule(name)
        assert isinstance(attention, nn.MultiheadAttention)
        replace_module(net, name, SelfAttention(attention))

    return name, edit


def _edits(trace: Trace) -> list[Edit]:
    plain, owned = plain_calls(trace), trace.owned
    found: list[Edit] = []
    for node in calls(trace.nodes, *LAYER_OPERATORS):
        name = trace.owner(node)
        module = trace.net.get_submodule(name)
        if node in trace.constants or (node in plain and not isinstance(getattr(module, "padding", None), str)):
            continue
        once = sum(each.target in LAYER_OPERATORS for each in owned[name]) == 1
        edit = _own_layer(trace, name, owned[name]) if once and name else None
        edit = edit or _split_bias(trace, node) or _self_attention(trace, node)
        if edit:
            found.append(edit)
    return found


def merged_branches(net: nn.Module, example: Tensor) -> tuple[nn.Module, tuple[str, ...]]:
    """Return (`net` with re-parameterised branches merged into one convolution each, or `net` itself; notes).

    RepVGG, MobileOne, FastViT and others train parallel branches that are one convolution at inference. Merged, there is one
    INT8 kernel, and scales can move through what follows.
    """
    if not any(hasattr(module, "reparameterize") for module in net.modules()):
        return net, ()
    merged = reparameterize_model(net, inplace=False).eval().requires_grad_(False)
    apart = difference(output_of(net, example), output_of(merged, example))
    if not apart <= MAX_REL_L2:
        return net, (f"branches stay: merged by re-parameterisation they would change the output by {apart:.1e}",)
    return merged, ("parallel branches merged by re-parameterisation",)


def _edit(net: nn.Module, edits: Sequence[Edit]) -> None:
    """Make `edits` on `net`; the modules that they add come in float32, and take the type of the rest."""
    kind = next(net.parameters()).dtype
    for _, edit in edits:
        edit(net)
    net.to(kind).eval()


def lowered(trace: Trace, example: Tensor) -> tuple[nn.Module, tuple[str, ...]]:
    """Return (the network of `trace` with plain layers, or itself if it has no others; notes on what was done)."""
    net, edits = trace.net, _edits(trace)
    if not edits:
        return net, ()

    kept, refused = preserving(net, edits, _edit, example)
    notes = [f"{len(kept)} layers made plain (padding, weights or biases of their own)"] if kept else []
    notes += [
        f"{name}: not made plain, "
        + ("the network's code needs it" if math.isinf(apart) else f"it would change the output by {apart:.1e}")
        for (name, _), apart in refused
    ]
    if kept:
        net = copy.deepcopy(net)
        _edit(net, kept)
    return net, tuple(notes)
