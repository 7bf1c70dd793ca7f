"""Where scales can move in a traced network: between what produces a tensor and every layer that reads it."""

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import fx, nn

from calib.structure.channels import (
    HOMOGENEOUS,
    LIMITS,
    PASSED_ON,
    ZERO,
    Reach,
    reach_of,
    readers_by_tensor,
    source_of,
)  # fmt: skip
from calib.structure.moves import FRONT, INSERT, LAYER, NORM, Place
from calib.structure.trace import Trace, aten, calls, shape

NORMS = {aten.layer_norm.default: 2, aten.rms_norm.default: 2, aten.group_norm.default: 2, aten.batch_norm.default: 1}
TOKENS, MAPS = -1, -3  # the axis of channels
POINTWISE = (
    aten.gelu.default, aten.silu.default, aten.silu_.default, aten.hardswish.default, aten.hardswish_.default,
    aten.mish.default, aten.mish_.default, aten.elu.default, aten.elu_.default, aten.tanh.default, aten.sigmoid.default,
    aten.mul.Tensor,
)  # fmt: skip


def absorbing(trace: Trace, plain: Mapping[fx.Node, str]) -> dict[fx.Node, str]:
    """Return the calls of layers that can absorb a scale: called once, of a kind whose weight has its outputs first."""
    read, found = trace.reads_parameter, {}
    for node, name in plain.items():
        module = trace.net.get_submodule(name)
        once = read[f"{name}.weight"] == 1 and read[f"{name}.bias"] <= 1
        if once and isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            found[node] = name
    return found


def channel_map(reach: Reach) -> tuple[int, ...] | None:
    """Return the producer's channel that each channel of the readers is; None if they cannot all be scaled."""
    maps = set()
    for labels in reach.readers.values():
        inside = labels[(labels != ZERO).any(1)]  # rows of zeros are padding
        if not len(inside) or not torch.equal(inside, inside[:1].expand_as(inside)):
            return None
        maps.add(tuple(int(label) for label in inside[0]))
    if len(maps) != 1:
        return None
    (rows,) = maps
    if min(rows) < 0 or len({*rows}) < len(rows) or reach.fixed & {*rows}:
        return None
    return rows


def _norm_places(trace: Trace, layers: Mapping[fx.Node, str]) -> Iterator[Place]:
    read = trace.reads_parameter
    for node in calls(trace.nodes, *NORMS):
        position = NORMS[node.target]  # type: ignore[index]
        weight = trace.parameter(node.args[position]) if len(node.args) > position else None
        name = (weight or "").removesuffix(".weight")
        if not weight or weight == name or read[weight] > 1 or trace.net.get_parameter(weight).ndim != 1:
            continue
        axis = -1 if node.target in (aten.layer_norm.default, aten.rms_norm.default) else 1
        if shape(node)[axis] != len(trace.net.get_parameter(weight)):
            continue
        reach = reach_of(trace, node, axis, layers)
        rows = channel_map(reach)
        if rows is None:
            continue
        bias = node.args[position + 1] if len(node.args) > position + 1 else None
        shifts = reach.shifts and trace.parameter(bias) == f"{name}.bias" and read[f"{name}.bias"] == 1
        yield Place(NORM, name, rows, tuple(reach.readers), shifts, tuple(reach.limits), attention=reach.attention)


def _layer_places(trace: Trace, layers: Mapping[fx.Node, str]) -> Iterator[Place]:
    for node, name in layers.items():
        reach = reach_of(trace, node, -1 if node.target is aten.linear.default else 1, layers)
        rows = channel_map(reach)
        if rows is not None:
            readers, limits = tuple(reach.readers), tuple(reach.limits)
            yield Place(LAYER, name, rows, readers, reach.shifts, limits, attention=reach.attention)


def _activation_before(node: fx.Node) -> fx.Node | None:
    """Return the activation whose values a layer reads, passed on or not; None if something else computes them."""
    before = source_of(node.args[0], (*PASSED_ON, *HOMOGENEOUS, *LIMITS))
    return before if before is not None and before.target in POINTWISE else None


def _insertions(trace: Trace, layers: Mapping[fx.Node, str], placed: Iterable[str]) -> Iterator[Place]:
    """Yield places behind activations that are modules, for layers that are not in `placed`."""
    done = {*placed}
    for node, name in layers.items():
        before = _activation_before(node)
        if name in done or before is None:
            continue
        owner = trace.owner(before)
        module, nodes = trace.net.get_submodule(owner), trace.owned.get(owner, [])
        alone = nodes and nodes[-1] is before and len([each for each in nodes if each.target is before.target]) == 1
        if not alone or any(True for _ in module.parameters()) or any(True for _ in module.children()):
            continue
        for axis in (TOKENS, MAPS)[: 2 if len(shape(before)) == 4 else 1]:
            reach = reach_of(trace, before, axis, layers)
            rows = channel_map(reach)
            if rows == tuple(range(shape(before)[axis])):
                done |= {*reach.readers}
                yield Place(INSERT, owner, rows, tuple(reach.readers), reach.shifts, axis=axis)
                break


def _in_front(trace: Trace, layers: Mapping[fx.Node, str], wanted: Collection[str]) -> Iterator[Place]:
    """Yield a place for each tensor that linear layers of `wanted`, or convolutions behind a concatenation, read.

    A concatenation puts channels of several producers side by side, whose ranges have nothing to do with each other. In
    TensorRT-RTX's engine of RRDB the operations added no kernel. A convolution may pad with zeros: no shift moves there.
    """
    linear = {node: name for node, name in layers.items() if name in wanted and node.target is aten.linear.default}
    others = {node: name for node, name in layers.items() if name in wanted and node.target is not aten.linear.default}
    for read, names in readers_by_tensor(linear).items():
        if read not in trace.constants:
            yield Place(FRONT, trace.owner(read), tuple(range(shape(read)[TOKENS])), tuple(names), shifts=True)
    for read, names in readers_by_tensor(others).items():
        if read.target is aten.cat.default and len(shape(read)) == 4:
            channels = tuple(range(shape(read)[MAPS]))
            yield Place(FRONT, trace.owner(read), channels, tuple(names), shifts=False, axis=MAPS)


def places_of(trace: Trace, plain: Mapping[fx.Node, str], quantized: Iterable[str]) -> tuple[Place, ...]:
    """Return all places where scales can move, each layer in at most one as a reader.

    `plain`: calls of layers by name. Only in front of `quantized` layers an operation is worth its time.
    """
    layers = absorbing(trace, plain)
    found: list[Place] = []
    for place in (*_norm_places(trace, layers), *_layer_places(trace, layers)):
        if not any({*place.readers} & {*other.readers} for other in found):
            found.append(place)
    found += _insertions(trace, layers, [name for place in found for name in place.readers])
    placed = {name for place in found for name in place.readers}
    return (*found, *_in_front(trace, layers, {*quantized} - placed))
