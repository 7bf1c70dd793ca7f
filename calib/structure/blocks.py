"""The blocks of a traced network, which branches stand beside: repeated modules that end in a residual sum, if any does."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from calib.hooks import removed
from calib.modules import returned
from calib.structure.channels import SUMS
from calib.structure.plain_layers import SequenceConv
from calib.structure.trace import Trace, calls, shape


@dataclass(frozen=True)
class Block:
    """A module that reads a tensor first and returns one first; `channels_last`: (B, ..., C) instead of (B, C, H, W)."""

    name: str
    channels_last: bool


def cones_of(trace: Trace, plain: Mapping[fx.Node, str]) -> dict[fx.Node, frozenset[str]]:
    """Return the layers that every node is computed from, by node."""
    cones: dict[fx.Node, frozenset[str]] = {}
    for node in trace.nodes:
        own = frozenset({plain[node]}) if node in plain else frozenset()
        cones[node] = own.union(*(cones[each] for each in node.all_input_nodes))
    return cones


def _inside(names: Collection[str], block: str) -> set[str]:
    return {name for name in names if name.startswith(f"{block}.")}


def _summing(trace: Trace, plain: Mapping[fx.Node, str]) -> Iterator[str]:
    """Yield modules that add two tensors computed by different layers of their own: a shortcut and what it goes around."""
    cones = cones_of(trace, plain)
    for node in calls(trace.nodes, *SUMS):
        one, other = node.args[:2]
        if not (isinstance(one, fx.Node) and isinstance(other, fx.Node)) or {one, other} & trace.constants:
            continue
        owner = trace.owner(node)
        if owner and shape(one) == shape(other) and _inside(cones[one], owner) != _inside(cones[other], owner):
            yield owner


def _pattern(name: str) -> str:
    return re.sub(r"\d+", r"\\d+", re.escape(name))


def _repeated(trace: Trace, layers: Collection[str]) -> set[str]:
    """Return the modules with layers inside whose class occurs more than once, without what only holds others."""
    found: dict[type, list[str]] = {}
    for name, module in trace.net.named_modules():
        if name and _inside(layers, name) and not isinstance(module, nn.Sequential | nn.ModuleList | SequenceConv):
            found.setdefault(type(module), []).append(name)
    return {name for names in found.values() if len(names) > 1 for name in names}


def _outermost(names: Collection[str]) -> set[str]:
    return {name for name in names if not any(name.startswith(f"{other}.") for other in names)}


def _alike(trace: Trace, layers: Collection[str], names: Collection[str]) -> list[str]:
    """Return the outermost of `names` and the modules of the same place in the network, in order of definition."""
    outermost = _outermost(names)
    patterns = {_pattern(name) for name in outermost if re.search(r"\d", name)}
    alike = [
        name
        for name, _ in trace.net.named_modules()
        if name in outermost or (any(re.fullmatch(each, name) for each in patterns) and _inside(layers, name))
    ]
    kept = _outermost(alike)
    return [name for name in alike if name in kept]


def _is_of_numbers(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and not x.is_nested


def _shapes(net: nn.Module, names: Iterable[str], example: Tensor) -> dict[str, tuple[torch.Size, torch.Size]]:
    """Return the shapes (input, output) of the modules that are called once, with a tensor first, and return one first."""
    found: dict[str, tuple[torch.Size, torch.Size]] = {}
    count: Counter[str] = Counter()

    def after(name: str, args: tuple[Any, ...], output: Any) -> None:
        count[name] += 1
        gives = returned(output)
        if args and all(_is_of_numbers(each) for each in (args[0], gives)):
            found[name] = args[0].shape, gives.shape

    handles = [
        net.get_submodule(name).register_forward_hook(lambda _m, args, y, name=name: after(name, args, y))
        for name in names
    ]
    with removed(handles), torch.no_grad():
        net(example)
    return {name: shapes for name, shapes in found.items() if count[name] == 1}


def _usable(trace: Trace, plain: Mapping[fx.Node, str], names: Sequence[str], example: Tensor) -> dict[str, Block]:
    """Return those of `names` that a branch can stand beside, in the same order."""
    first: dict[str, str] = {}  # block -> the first layer that runs in it, which may be itself
    for layer in plain.values():
        for name in names:
            if f"{layer}.".startswith(f"{name}."):
                first.setdefault(name, layer)
    found = {}
    for name, (given, gives) in _shapes(trace.net, names, example).items():
        maps = len(given) == 4 and name in first and isinstance(trace.net.get_submodule(first[name]), nn.Conv2d)
        if len(given) == len(gives) and len(given) >= 2:
            found[name] = Block(name, not maps)
    return {name: found[name] for name in names if name in found}


def blocks_of(
    trace: Trace, plain: Mapping[fx.Node, str], quantized: Sequence[str], example: Tensor
) -> dict[str, Block]:
    """Return the blocks by name, none inside another, in order of definition.

    They are the outermost modules that add a shortcut, read a tensor first and return one first. Where there are none, they
    are such modules of a repeated class; in a plain chain of layers they are the layers to be quantized.
    `plain`: calls of layers by name; `quantized`: names of those to be quantized.
    """
    layers = {*plain.values()}
    for names in ({*_summing(trace, plain)}, _repeated(trace, layers)):
        usable = _usable(trace, plain, sorted(names), example)
        if found := _usable(trace, plain, _alike(trace, layers, usable), example):
            return found
    return _usable(trace, plain, quantized, example)
