"""Lowering at intake: what computes like a layer becomes a plain Linear or Conv2d, with the same output.

    a convolution that pads its input itself ("same", reflected)   padding, then a convolution without or with padding
    a Conv1d; a ConvTranspose2d with a stride of 1                 a Conv2d (calib/structure/plain_layers.py)
    a weight that is computed in the forward pass (standardised)   the weight as it comes out
    a weight that is read outside its module, with a bias of       the module with that bias, called as it is where the
    query and value alone (BEiT, EVA, Swin v2)                     bias is absent
    torch's MultiheadAttention                                     attention with the layers qkv and proj, or over several
                                                                   tensors query, key, value and proj
    branches that training keeps apart (RepVGG, MobileOne)         one convolution, as the network's own code merges them

Every replacement is proved by the network's output; one that changes it is taken back, and the layer stays in float.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, fx, nn

from calib.modules import replace_module
from calib.structure.layers import FEWEST, plain_calls
from calib.structure.plain_layers import BORDERS, is_turned, plain_conv, plain_linear, turned_conv
from calib.structure.proof import MAX_REL_L2, difference, output_of, preserving
from calib.structure.torch_attention import plain_attention
from calib.structure.trace import CONV1D, CONV2D, LAYER_OPERATORS, PADS, Trace, aten, calls, padding_of

Edit = tuple[str, Callable[[nn.Module], None]]  # name of the module, what to do to a copy of the network


def _border(node: fx.Node) -> tuple[list[int], str] | None:
    """Return ((left, right, top, bottom), mode) of a padding around maps or sequences; None for anything else."""
    pads, mode, value = padding_of(node)
    if mode not in BORDERS or value or min(pads) < 0 or len(pads) not in (2, 4):
        return None
    return [0, 0, *pads][-4:], mode  # the positions of a sequence are the height of a map


@dataclass(frozen=True)
class _Own:
    """One call of a module that computes a layer and nothing else: `node`, behind a padding by `pads`; weight and bias."""

    node: fx.Node
    pads: list[int]
    mode: str
    weight: Tensor
    bias: Tensor | None

    def like(self, other: "_Own") -> bool:
        """Whether two calls do the same."""
        values = zip((self.weight, self.bias), (other.weight, other.bias), strict=True)
        same, others = ((each.node.target, each.node.args[3:], each.pads, each.mode) for each in (self, other))
        return same == others and all(one is two or torch.equal(one, two) for one, two in values)  # type: ignore[arg-type]

    def plain(self) -> nn.Module | None:
        """Return the plain layer that computes it, or None."""
        if self.node.target in (*CONV1D, *CONV2D):
            return plain_conv(self.weight, self.bias, self.node, self.pads, self.mode)
        if any(self.pads):
            return None
        if self.node.target is aten.linear.default:
            return plain_linear(self.weight, self.bias)
        return turned_conv(self.weight, self.bias, self.node) if is_turned(self.node) else None


def _own_call(trace: Trace, nodes: Sequence[fx.Node]) -> _Own | None:
    """Return the call that `nodes` are: a layer with constant weights that were learned, at most behind a padding."""
    *before, node = nodes
    if len(before) > 1 or any(each.target not in PADS or node.args[0] is not each for each in before):
        return None
    weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
    if weight not in trace.constants or (bias is not None and bias not in trace.constants):
        return None
    border = _border(before[0]) if before else ([0, 0, 0, 0], "constant")
    if border is None or not trace.learned(weight):  # type: ignore[arg-type]
        return None
    values = trace.constant(weight), None if bias is None else trace.constant(bias)  # type: ignore[arg-type]
    return _Own(node, *border, *values)


def _own_layer(trace: Trace, name: str, nodes: Sequence[fx.Node]) -> Edit | None:
    """The module `name` computes the same layer in every call, and nothing else but a padding before it."""
    ends = [index + 1 for index, node in enumerate(nodes) if node.target in LAYER_OPERATORS]
    if ends[-1] != len(nodes):
        return None
    calls_of = [_own_call(trace, nodes[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    first = calls_of[0]
    if first is None or any(each is None or not first.like(each) for each in calls_of):
        return None
    if first.plain() is None:
        return None
    return name, lambda net: replace_module(net, name, first.plain())  # type: ignore[arg-type]


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


def _torchs_attention(trace: Trace, node: fx.Node) -> Edit | None:
    """torch's MultiheadAttention, over one tensor where one product reads the packed weight in every call."""
    name = trace.owner(node)
    module = trace.net.get_submodule(name)
    if not isinstance(module, nn.MultiheadAttention):
        return None
    products = [each for each in trace.owned[name] if each.target in LAYER_OPERATORS]
    packed = sum(trace.parameter(each.args[1]) == f"{name}.in_proj_weight" for each in products)
    one_tensor = 2 * packed == len(products)  # each call has one for its output
    plain = plain_attention(module, one_tensor)
    if plain is None:
        return None
    return name, lambda net: replace_module(net, name, copy.deepcopy(plain))


def _is_lowered(node: fx.Node, module: nn.Module) -> bool:
    """Whether a plain call `node` of `module` is one that becomes a Conv2d."""
    if isinstance(getattr(module, "padding", None), str) or is_turned(node):
        return True
    return isinstance(module, nn.Conv1d) and min(module.in_channels, module.out_channels) >= FEWEST


def _edits(trace: Trace) -> list[Edit]:
    plain, owned = plain_calls(trace), trace.owned
    found: dict[str, Edit] = {}
    for node in calls(trace.nodes, *LAYER_OPERATORS):
        name = trace.owner(node)
        if node in trace.constants or (node in plain and not _is_lowered(node, trace.net.get_submodule(name))):
            continue
        edit = _own_layer(trace, name, owned[name]) if name and name not in found else None
        edit = edit or _split_bias(trace, node) or _torchs_attention(trace, node)
        if edit:
            found.setdefault(edit[0], edit)
    return list(found.values())


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
