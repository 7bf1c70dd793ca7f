"""The layers of a traced network, and which of them stay in float, each with the reason that the graph gives.

A layer is a Linear or convolution that is called as a module, with its own weight and bias and nothing beside. What computes
its weight in the forward pass, pads in a way of its own or reads the weight of another module is no such layer, unless
calib/structure/lowering.py turns it into one.
"""

import math
import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx, nn

from calib.structure.channels import PASSED_ON, SUMS
from calib.structure.channels import PRODUCTS as FACTORS
from calib.structure.trace import LAYER_OPERATORS, Trace, ancestors, aten, shape

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.modules.conv._ConvTransposeNd)
FEWEST_FIRST = 4  # input channels of a first layer: up to here it stays in float
# what makes one position of several: pooling, and the choice of a class token
REDUCING = (
    aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.adaptive_avg_pool2d.default,
    aten.adaptive_max_pool2d.default, aten.avg_pool2d.default, aten.select.int, aten.slice.Tensor, operator.getitem,
)  # fmt: skip
PRODUCTS = (
    aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten.einsum.default,
)  # fmt: skip
RECURRENT = (aten.gru.input, aten.lstm.input, aten.rnn_tanh.input, aten.rnn_relu.input)
PARAMETER = "a product with a parameter: the tool quantizes Linear and convolution modules"
FEWEST = 8  # input channels, and output channels, of any other layer that is quantized


@dataclass(frozen=True)
class Layer:
    """One layer. `why_float`: the reason why it stays in FP16, None if it is quantized.

    `roundable`: whether it can be quantized all the same, which simulations of the papers do with first and last layers.
    """

    name: str
    why_float: str | None = None
    roundable: bool = True


def plain_calls(trace: Trace) -> dict[fx.Node, str]:
    """Return the calls of layers in `trace`, with the name of the layer."""
    found: dict[fx.Node, str] = {}
    for name, nodes in trace.owned.items():
        if isinstance(trace.net.get_submodule(name), KINDS) and all(_is_plain(trace, name, node) for node in nodes):
            found |= dict.fromkeys(nodes, name)
    return found


def _is_plain(trace: Trace, name: str, node: fx.Node) -> bool:
    if node.target not in LAYER_OPERATORS or trace.parameter(node.args[1]) != f"{name}.weight":
        return False
    bias = node.args[2] if len(node.args) > 2 else None
    return bias is None or trace.parameter(bias) == f"{name}.bias"


def _multiplies_by_parameter(trace: Trace, node: fx.Node) -> bool:
    """Whether `node` is a product of matrices, one of which is learned and no layer's, as in `x @ self.projection`."""
    return node.target in PRODUCTS and any(
        each in trace.constants and len(shape(each)) > 1 and trace.learned(each) for each in node.all_input_nodes
    )


def _why_not_plain(trace: Trace, node: fx.Node) -> str | None:
    """Return why what `node` computes is no layer, or None if it does not compute like one."""
    if node.target in RECURRENT:
        return "a recurrent layer: the tool quantizes Linear and convolution modules"
    if node.target not in LAYER_OPERATORS:
        if node in trace.constants or not _multiplies_by_parameter(trace, node):
            return None
        return PARAMETER
    weight = node.args[1]
    read = trace.parameter(weight)
    if node in trace.constants:
        return "it reads constants only: it can be computed before the network runs"
    if weight in trace.constants and not trace.learned(weight):  # type: ignore[arg-type]
        return "its weight is a fixed filter that nothing has learned"
    if read and read.rpartition(".")[0] == trace.owner(node):
        if isinstance(trace.net.get_submodule(trace.owner(node)), KINDS):
            return "its module computes more than the layer itself"
        return PARAMETER
    if read:
        return f"the weight '{read}' is read outside its own module"
    return f"its weight {'is computed in the forward pass' if weight in trace.constants else 'depends on the input'}"


def not_plain(trace: Trace, plain: Mapping[fx.Node, str]) -> dict[str, str]:
    """Return what computes like a layer and is none: name of the module -> why it stays in float.

    A product with a parameter has the parameter's name, where it has one; a second and later product of the same module has
    its number behind the name.
    """
    found: dict[str, str] = {}
    count: Counter[str] = Counter()
    for node in trace.nodes:
        why = _why_not_plain(trace, node) if node.op == "call_function" and node not in plain else None
        if why is not None:
            name = trace.owner(node)
            if why == PARAMETER and (read := next(filter(None, map(trace.parameter, node.all_input_nodes)), None)):
                found[read] = why
                continue
            count[name] += node.target not in LAYER_OPERATORS  # a layer may be called several times
            found[name if count[name] <= 1 else f"{name} (no. {count[name]})".strip()] = why
    return found


def _is_last(node: fx.Node) -> bool:
    """Whether the network returns what a layer computes, and nothing in it reads that, but to pass values on.

    Keys and values that a decoding step returns for later steps are read by its own attention too: their layers are inner
    ones.
    """
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        each = waiting.pop()
        for user in each.users:
            if user not in seen:
                seen.add(user)
                if user.target in PASSED_ON:
                    waiting.append(user)
    return any(each.op == "output" for each in seen) and all(
        each.op == "output" or each.target in PASSED_ON for each in seen
    )


def _positions(node: fx.Node) -> int:
    """Return how many positions a layer computes in one run."""
    given = shape(node.args[0])  # type: ignore[arg-type]
    return math.prod(given) // given[-1 if node.target is aten.linear.default else min(1, len(given) - 1)]


def _numbers(node: fx.Node) -> int:
    return math.prod(shape(node))


def _pooled(node: fx.Node, plain: Mapping[fx.Node, str]) -> bool:
    """Whether a layer reads one position, taken from more by pooling or selection and not by a convolution or a view.

    Where no layer computes more than one, as in the decoding step of a language model, none is behind pooling: what
    reduces there are the means of norms and the halves of a rotation.
    """
    if _positions(node) > 1 or all(_positions(each) == 1 for each in plain):
        return False
    waiting, seen = [node], set()
    while waiting:
        each = waiting.pop()
        if each in seen or each.op != "call_function":
            continue
        seen.add(each)
        if each in plain:
            if _positions(each) == 1:
                waiting.append(each.args[0])  # type: ignore[arg-type]
        elif each.target in REDUCING and any(_numbers(before) > _numbers(each) for before in each.all_input_nodes):
            return True
        else:
            waiting += each.all_input_nodes
    return False


def _is_condition(node: fx.Node) -> bool:
    """Whether a layer computes one position per sample, and all that comes of it scales or shifts many positions.

    So do the layers that read the time step and the class of a diffusion network (adaLN, FiLM).
    """
    if _positions(node) > 1:
        return False
    waiting, seen = [node], {node}
    while waiting:
        each = waiting.pop()
        for user in each.users:
            if user.op == "output":
                return False
            spread = user.target in (*SUMS, *FACTORS, aten.sub.Tensor) and _numbers(user) > _numbers(each)
            if not spread and user not in seen:
                seen.add(user)
                waiting.append(user)
    return True


def _why_unwritten(trace: Trace, module: nn.Module) -> str | None:
    """Return why a graph has no INT8 form of a layer of this kind, or None."""
    if module in trace.called_unusually:
        return "it is called with other arguments than one tensor, which an INT8 layer in its place does not take"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has hooks of its own, which an INT8 layer in its place would not run"
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "a transposed convolution: TensorRT-RTX runs it in FP16 even where its input and its weight are INT8"
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return f"the tool writes INT8 for Linear and Conv2d, not for {type(module).__name__}"
    if isinstance(module, nn.Conv2d) and isinstance(module.padding, str):
        return f"the tool writes INT8 for a padding in numbers, not for '{module.padding}'"
    return None


def _read_elsewhere(trace: Trace, name: str, plain: Mapping[fx.Node, str]) -> str | None:
    """Return why the weight of a layer cannot be rounded because other code takes it from the layer, or None."""
    readers = (user for node in trace.placeholders[f"{name}.weight"] for user in node.users if user not in plain)
    for owner in map(trace.owner, readers):
        by = f"by '{owner}'" if owner else "in the network's own code"
        return f"its weight is also read {by}: rounded, it would change what is computed there"
    return None


def _why_float(trace: Trace, node: fx.Node, module: nn.Module, plain: Mapping[fx.Node, str]) -> tuple[str | None, bool]:
    """Return (why the layer stays in float or None, whether it could be quantized)."""
    unwritten = _why_unwritten(trace, module)
    inputs, outputs = (
        (module.in_features, module.out_features)
        if isinstance(module, nn.Linear)
        else (int(module.in_channels), int(module.out_channels))  # type: ignore[arg-type]
    )
    first = not any(each in plain for each in ancestors(node))
    why = unwritten
    if first and inputs <= FEWEST_FIRST:
        why = f"the first layer: {inputs} input channels are too few for INT8, and its error reaches every layer"
    elif _is_last(node):
        why = "the last layer: its error goes straight into the output"
    elif _pooled(node, plain):
        why = "it computes one position per image, behind pooling: INT8 saves no time"
    elif _is_condition(node):
        why = "it computes one position per sample, which scales or shifts all others: INT8 saves no time"
    elif min(inputs, outputs) < FEWEST:
        why = f"{inputs} channels in and {outputs} out are too few for an INT8 kernel"
    return why, unwritten is None


def layers_of(trace: Trace, plain: Mapping[fx.Node, str]) -> dict[str, Layer]:
    """Return all layers by name, in order of definition; `plain` is from `plain_calls`.

    A layer that is called several times has one scale for what it reads in all calls; a reason to stay in float in one of
    them is a reason for all.
    """
    calls_of: dict[str, list[fx.Node]] = {}
    for node, name in plain.items():
        calls_of.setdefault(name, []).append(node)
    found = {}
    for name, module in trace.net.named_modules(remove_duplicate=False):
        if name not in calls_of:
            continue
        reasons = [_why_float(trace, node, module, plain) for node in calls_of[name]]
        elsewhere = _read_elsewhere(trace, name, plain)
        why = elsewhere or next((why for why, _ in reasons if why is not None), None)
        found[name] = Layer(name, why, not elsewhere and all(roundable for _, roundable in reasons))
    return found
