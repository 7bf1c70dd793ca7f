"""The graph of one run of a network, from `torch.export`: what is computed, by which module, from which parameters."""

import functools
import operator
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from calib.errors import ONE_TYPE, UserError, first_line, of_types
from calib.hooks import removed
from calib.input_rows import separate_inputs
from calib.modules import first_names, without_call
from calib.outputs import register_dataclasses, separate_outputs
from calib.quiet import no_collection, quiet

aten = torch.ops.aten
CONV1D = (aten.conv1d.default, aten.conv1d.padding)
CONV2D = (aten.conv2d.default, aten.conv2d.padding)
CONVOLUTIONS = (
    *CONV1D, *CONV2D, aten.conv3d.default, aten.conv3d.padding,
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
)  # fmt: skip
LAYER_OPERATORS = (aten.linear.default, *CONVOLUTIONS)
PADS = {  # with the names of their arguments
    aten.pad.default: ("input", "pad", "mode", "value"),
    aten.constant_pad_nd.default: ("input", "pad", "value"),
}


def _in_place(node: fx.Node) -> bool:
    """Whether the operator edits its first argument."""
    schema = getattr(node.target, "_schema", None)
    return bool(
        schema and schema.arguments and schema.arguments[0].alias_info and schema.arguments[0].alias_info.is_write
    )


def _edited_views(graph: fx.Graph) -> set[fx.Node]:
    """Return all tensors that share their numbers with another one and of which any is edited in place."""
    shared: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        of = node.args[0] if node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node) else None
        if of is not None and (_is_view(node) or node.target is operator.getitem):
            shared[node] = shared.setdefault(of, {of})
            shared[node].add(node)
    edits = [node for node in graph.nodes if node.op == "call_function" and _in_place(node) and node.args[0] in shared]
    return {each for node in edits for each in (node, *shared[node.args[0]])}


def _is_view(node: fx.Node) -> bool:
    """Whether the operator may return another view of its first argument."""
    schema = getattr(node.target, "_schema", None)
    named = str(node.target).split(".")[1] if schema else ""
    aliased = bool(schema and schema.arguments and schema.arguments[0].alias_info)
    return (aliased and not _in_place(node)) or named in ("reshape", "flatten", "contiguous", "to")


def _read_what_was_edited(graph: fx.Graph) -> None:
    """Let everything behind an operator that edits its input read what the operator returns (edits `graph`)."""
    position = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op == "call_function" and _in_place(node) and isinstance(node.args[0], fx.Node):
            edited = node.args[0]
            for user in [user for user in edited.users if position[user] > position[node]]:
                user.replace_input_with(edited, node)


def _without_unread(graph: fx.Graph) -> None:
    """Remove what no output is computed from, such as a head for training: an exported graph lacks it (edits `graph`)."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and not _in_place(node):
            graph.erase_node(node)


@contextmanager
def _watched_calls(net: nn.Module, unusual: set[nn.Module]) -> Iterator[None]:
    """Add to `unusual` every module that is called with anything but one positional argument.

    Dataclasses that `net` returns become known to torch.export, which refuses others.
    """

    def look(module: nn.Module, args: tuple[Any, ...], by_name: dict[str, Any]) -> None:
        if len(args) != 1 or by_name:
            unusual.add(module)

    handles = [module.register_forward_pre_hook(look, with_kwargs=True) for module in net.modules()]
    handles.append(net.register_forward_hook(lambda _net, _args, returned: register_dataclasses(returned)))
    with removed(handles):
        yield


def _reason(error: Exception) -> str:
    """Return what torch.export says of a network that it cannot trace, and where in the network's code, in one line."""
    said = f"{type(error).__name__}: {first_line(error, 200)}"
    place = re.search(r"raised this error:\n\s*File \"(.+)\", line (\d+), in .*\n\s*(.+)", str(error))
    return f"{said}; {place[1]}, line {place[2]}: {place[3][:100]}" if place else said


class Trace:
    """The graph of `net` on an `example`, (1, 3, H, W) or a row of named inputs (1, N), in order of execution.

    `called_unusually` holds the modules that are called with more or less than one tensor, or with one by its keyword.

    Raises UserError if `torch.export` cannot trace the network; the message holds the first line of its reason.
    """

    def __init__(self, net: nn.Module, example: Tensor) -> None:
        self.called_unusually: set[nn.Module] = set()
        try:
            called = _watched_calls(net, self.called_unusually)
            with torch.no_grad(), quiet("torch"), warnings.catch_warnings(), separate_outputs(net), called:
                warnings.simplefilter("ignore")  # of tables that a network keeps between runs
                given = separate_inputs(net, example)
                args, by_name = ((given,), None) if isinstance(given, Tensor) else ((), dict(given))
                with no_collection():
                    program = torch.export.export(net, args, by_name, strict=False)
        except Exception as error:  # whatever the network's own code raises while it is traced
            expected = ONE_TYPE if of_types(error) else "expected a forward pass without branches that depend on values"
            raise UserError(
                f"{type(net).__name__} cannot be traced by torch.export ({_reason(error)}): {expected}"
            ) from error
        self.net, self.graph = net, program.graph
        self.edited = _edited_views(self.graph)
        _read_what_was_edited(self.graph)
        _without_unread(self.graph)
        self.nodes = list(self.graph.nodes)
        signature = program.graph_signature
        self._first = first_names(net)
        named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self._learned = {*signature.inputs_to_parameters}
        self.parameters = {each: self._first_name(name) for each, name in named.items()}  # placeholder -> name
        self._given = {**program.state_dict, **program.constants}
        self._names = {**named, **signature.inputs_to_lifted_tensor_constants}
        self._values: dict[fx.Node, Any] = {}
        self.constants = self._constants()

    def _first_name(self, parameter: str) -> str:
        """Return the name of `parameter` in the first place where its module lies."""
        module, _, own = parameter.rpartition(".")
        return f"{self._first.get(module, module)}.{own}" if module else parameter

    def _constants(self) -> set[fx.Node]:
        """Nodes whose value does not depend on the input."""
        found: set[fx.Node] = set()
        for node in self.nodes:
            if node in self.edited:
                constant = False
            elif node.op == "placeholder":
                constant = node.name in self._names
            else:
                constant = node.op in ("call_function", "get_attr") and all(
                    each in found for each in node.all_input_nodes
                )
            if constant:
                found.add(node)
        return found

    def constant(self, node: fx.Node) -> Any:
        """Return the value of a node that does not depend on the input."""
        if node not in self._values:
            if node.op == "placeholder":
                self._values[node] = self._given[self._names[node.name]].detach()
            elif node.op == "get_attr":
                self._values[node] = getattr(self.graph.owning_module, str(node.target))
            else:
                args: Any = fx.map_arg(node.args, self.constant)
                kwargs: Any = fx.map_arg(node.kwargs, self.constant)
                with torch.no_grad():
                    self._values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self._values[node]

    def owner(self, node: fx.Node) -> str:
        """Return the name of the innermost module that computes `node`; empty for the network itself.

        Of a module that lies at several places it is the first name.
        """
        names = modules_of(node)
        own = without_call(names[-1]) if names else ""
        return self._first.get(own, own)

    @functools.cached_property
    def within(self) -> dict[str, set[fx.Node]]:
        """What every call of a module computes, its submodules included, by its name as of `modules_of`."""
        found: dict[str, set[fx.Node]] = {}
        for node in self.nodes:
            for name in modules_of(node):
                found.setdefault(name, set()).add(node)
        return found

    @functools.cached_property
    def owned(self) -> dict[str, list[fx.Node]]:
        """What every module computes itself, its submodules apart, by name."""
        found: dict[str, list[fx.Node]] = {}
        for node in self.nodes:
            if node.op == "call_function" and node not in self.constants:
                found.setdefault(self.owner(node), []).append(node)
        return found

    def parameter(self, node: object) -> str | None:
        """Return the name of the parameter that `node` is, or None."""
        return self.parameters.get(node.name) if isinstance(node, fx.Node) else None

    def learned(self, node: fx.Node) -> bool:
        """Whether the value of `node` comes from a parameter; that of a fixed filter, in a buffer, does not."""
        return any(each.name in self._learned for each in {node, *ancestors(node)})

    @functools.cached_property
    def position(self) -> dict[fx.Node, int]:
        """The number of every node in order of execution."""
        return {node: index for index, node in enumerate(self.nodes)}

    @functools.cached_property
    def placeholders(self) -> dict[str, list[fx.Node]]:
        """The inputs of the graph that stand for a parameter, by its name."""
        found: dict[str, list[fx.Node]] = defaultdict(list)
        for node in self.nodes:
            if node.name in self.parameters:
                found[self.parameters[node.name]].append(node)
        return found

    @functools.cached_property
    def reads_parameter(self) -> Counter[str]:
        """How often each parameter is read."""
        return Counter({name: sum(len(node.users) for node in nodes) for name, nodes in self.placeholders.items()})


def modules_of(node: fx.Node) -> list[str]:
    """Return the names of the modules that `node` lies in, the outermost first; those of a second call end in '@1'."""
    names = []
    for key, (name, _) in (node.meta.get("nn_module_stack") or {}).items():
        call = re.search(r"@\d+$", key)  # torch.export tells the call here, and by some paths in the name as well
        if name:
            names.append(f"{name}{call[0]}" if call and "@" not in name else name)
    return names


def shape(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of the tensor that `node` computes; empty for anything else."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def padding_of(node: fx.Node) -> tuple[list[int], str, float]:
    """Return (the pads as torch orders them, the mode, the value) of a call of one of `PADS`."""
    given: dict[str, Any] = {**dict(zip(PADS[node.target], node.args, strict=False)), **node.kwargs}  # type: ignore[index]
    return list(given["pad"]), given.get("mode", "constant"), given.get("value") or 0.0


def ancestors(node: fx.Node) -> set[fx.Node]:
    """Return all that `node` is computed from."""
    found: set[fx.Node] = set()
    waiting = list(node.all_input_nodes)
    while waiting:
        each = waiting.pop()
        if each not in found:
            found.add(each)
            waiting += each.all_input_nodes
    return found


def calls(nodes: Sequence[fx.Node], *targets: object) -> Iterator[fx.Node]:
    """Yield the calls of these operators."""
    return (node for node in nodes if node.op == "call_function" and node.target in targets)
