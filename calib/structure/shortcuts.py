"""The tensors that go around a convolutional block: operands of a residual sum whose other operand a convolution returns."""

import re
from collections.abc import Iterator, Mapping

from torch import fx, nn

from calib.structure.blocks import cones_of
from calib.structure.channels import SAME, SUMS, source_of
from calib.structure.layers import Layer
from calib.structure.trace import CONVOLUTIONS, Trace, calls, modules_of, shape


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Yield what reads the values of `node`, behind operators that pass them on."""
    for user in node.users:
        if user.target in SAME:
            yield from _readers(user)
        else:
            yield user


def _returned_by(trace: Trace, node: fx.Node) -> str | None:
    """Return the outermost module whose only result is `node`, if that module is called once.

    An nn.Sequential is left out: it would run a quantizer that it gets as a child.
    """
    for name in modules_of(node):
        module = None if "@" in name else trace.net.get_submodule(name)
        names = [other for other, each in trace.net.named_modules(remove_duplicate=False) if each is module]
        if len(names) != 1 or isinstance(module, nn.Sequential):
            continue
        inside = trace.within[name]
        results = {each for each in inside if any(user not in inside for user in each.users)}
        passed_on = {each for each in results if source_of(each, SAME) is node}
        called_once = not any(re.fullmatch(re.escape(name) + r"@\d+", other) for other in trace.within)
        if results and results == passed_on and called_once:
            return name
    return None


def shortcuts_of(trace: Trace, plain: Mapping[fx.Node, str], layers: Mapping[str, Layer]) -> dict[str, tuple[str, ...]]:
    """Return the modules that return a shortcut, and the layers to be quantized that read the same tensor.

    Of the two operands of a sum, the one that fewer layers compute is the shortcut; the other has to come from a convolution
    to be quantized. Tensors that anything else reads are left out. `plain`: calls of layers by name.
    """
    cones = cones_of(trace, plain)
    found: dict[str, tuple[str, ...]] = {}

    def quantized(node: fx.Node) -> bool:
        return node in plain and layers[plain[node]].why_float is None

    for node in calls(trace.nodes, *SUMS):
        one, other = (source_of(each, SAME) for each in node.args[:2])
        if one is None or other is None or {one, other} & trace.constants or shape(one) != shape(other) or node.kwargs:
            continue
        shortcut, summand = sorted((one, other), key=lambda each: len(cones[each]))
        readers = list(_readers(shortcut))
        if not quantized(summand) or summand.target not in CONVOLUTIONS or {shortcut, summand} & trace.edited:
            continue
        if not all(reader.target in SUMS or quantized(reader) for reader in readers):
            continue
        if name := _returned_by(trace, shortcut):
            found[name] = tuple(dict.fromkeys(plain[reader] for reader in readers if reader in plain))
    return found
