"""Where the channels of a tensor go: every reader of them, found by running shape operations on numbers of channels.

In the place of a tensor x stands a tensor of labels: which channel of x each element is. Operators that move elements
(reshape, permute, roll, a window partition, a split of a packed qkv) move labels in the same way; those that leave
multiples of a channel multiples (ReLU, pooling, a product with something else, attention over values) keep them. Wherever
any other operator reads a channel, that channel cannot be scaled.
"""

import heapq
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from calib.structure.trace import CONVOLUTIONS, PADS, Trace, aten, padding_of, shape

ZERO = -1.0  # label of an element that is zero, whatever the scale
OTHER = -2.0  # label of an element that comes from elsewhere

SAME = (
    aten.dropout.default, aten.dropout_.default, aten.contiguous.default, aten.clone.default, aten.alias.default,
    aten.detach.default, aten.detach_.default, aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default,
    aten.feature_dropout.default, aten.lift_fresh_copy.default,
)  # fmt: skip
MOVING = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.permute.default, aten.transpose.int,
    aten.t.default, aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.select.int, aten.slice.Tensor, aten.expand.default, aten.roll.default,
    aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.index.Tensor,
    aten.index_select.default, aten.cat.default, aten.stack.default, aten.repeat.default, aten.flip.default,
    aten.movedim.int, aten.movedim.intlist, aten.narrow.default, aten.pixel_shuffle.default, aten.pixel_unshuffle.default,
    aten.channel_shuffle.default, aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default, operator.getitem,
    aten.unfold.default, aten.split.sizes, aten.swapaxes.default, aten.tile.default, aten.numpy_T.default,
)  # fmt: skip
VIEWS = (aten.view.default, aten._unsafe_view.default)
PASSED_ON = {*SAME, *MOVING}
HOMOGENEOUS = (
    aten.relu.default, aten.relu_.default, aten.leaky_relu.default, aten.leaky_relu_.default, aten.prelu.default,
    aten.abs.default, aten.neg.default,
)  # fmt: skip
AVERAGING = (
    aten.mean.dim, aten.sum.dim_IntList, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default,
    aten.upsample_bilinear2d.vec, aten.upsample_bilinear2d.default,
    aten.upsample_bicubic2d.vec,
)  # fmt: skip
LARGEST = (aten.max_pool2d.default, aten.amax.default, aten.adaptive_max_pool2d.default)
SUMS = (aten.add.Tensor, aten.add_.Tensor)
PRODUCTS = (aten.mul.Tensor, aten.mul_.Tensor)
QUOTIENTS = (aten.div.Tensor, aten.div_.Tensor)
MATRIX_PRODUCTS = (aten.matmul.default, aten.bmm.default)
SOFTMAX = (aten.softmax.int, aten._softmax.default)
LIMITS = (aten.hardtanh.default, aten.hardtanh_.default)


@dataclass
class Reach:
    """Where the channels of one tensor go.

    `readers`: labels (rows, C) of what each layer reads, channels last. `fixed`: channels that something reads which a scale
    would change. `shifts`: whether a constant per channel may be subtracted on the way as well. `limits`: ReLU6 modules on
    the way, which get limits per channel. `attention`: whether an attention lies between. `linear`: whether all that lies
    between commutes with any factor per channel.
    """

    readers: dict[str, Tensor] = field(default_factory=dict)
    fixed: set[int] = field(default_factory=set)
    shifts: bool = True
    limits: list[str] = field(default_factory=list)
    attention: bool = False
    linear: bool = True


def source_of(node: object, passed_on: Collection[object]) -> fx.Node | None:
    """Return what computes the values of `node`, before operators of `passed_on`; None if that is no node."""
    while isinstance(node, fx.Node) and node.target in passed_on:
        node = node.args[0]
    return node if isinstance(node, fx.Node) else None


def readers_by_tensor(layers: Mapping[fx.Node, str]) -> dict[fx.Node, list[str]]:
    """Return the names of the layers that read each tensor; `layers`: calls of layers and their names."""
    readers: dict[fx.Node, list[str]] = {}
    for node, name in layers.items():
        if (read := source_of(node.args[0], SAME)) is not None:
            readers.setdefault(read, []).append(name)
    return readers


Labels = Any  # a Tensor, or a tuple of them


def _channel_axis(node: fx.Node) -> int:
    """Return the axis of the channels in what `node` reads: a layer, a norm, or a product with a constant per channel."""
    if node.target is aten.linear.default:
        return -1
    if node.target in PRODUCTS:
        size = shape(node.args[1])  # type: ignore[arg-type]
        return max(range(len(size)), key=lambda axis: size[axis]) - len(size)
    return 1


class _Walk:
    """The labels of all tensors between one tensor and the layers that read it."""

    def __init__(self, trace: Trace, start: fx.Node, axis: int, layers: Mapping[fx.Node, str]) -> None:
        self.trace, self.layers, self.start = trace, layers, start
        size = shape(start)
        along = [-1 if dimension == axis % len(size) else 1 for dimension in range(len(size))]
        labels = torch.arange(size[axis], dtype=torch.float64).reshape(along).expand(size)
        self.labels: dict[fx.Node, Labels] = {start: labels}
        self.channels = size[axis]
        self.reach = Reach()

    def of(self, node: object) -> Labels | None:
        return self.labels.get(node) if isinstance(node, fx.Node) else None

    def labelled(self, node: fx.Node) -> list[fx.Node]:
        return [each for each in node.all_input_nodes if each in self.labels]

    def values(self, node: fx.Node) -> tuple[Any, Any]:
        """Return the arguments of `node` with labels in the place of tensors."""

        def value(each: fx.Node) -> Any:
            if each in self.labels:
                return self.labels[each]
            if each in self.trace.constants and not each.meta["val"].is_floating_point():
                return self.trace.constant(each)
            return torch.full(shape(each), OTHER, dtype=torch.float64)

        return fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)

    def fix(self, node: object) -> None:
        """Record that something reads the channels in the tensor `node` in a way that a scale would change."""
        found = self.of(node)
        for labels in found if isinstance(found, list | tuple) else (found,):
            if labels is not None:
                self.reach.fixed |= {int(label) for label in labels.unique() if label >= 0}

    def stop(self, node: fx.Node) -> None:
        """Record that `node` reads all channels of its inputs in such a way."""
        for each in self.labelled(node):
            self.fix(each)

    def read(self, node: fx.Node) -> None:
        """Record that a layer reads labelled channels."""
        labels = self.of(node.args[0])
        if labels is None or len(self.labelled(node)) > 1:
            self.stop(node)
            return
        labels = labels.movedim(_channel_axis(node), -1)
        if node.target in CONVOLUTIONS:
            padding = node.args[4] if len(node.args) > 4 else 0
            pads = padding if isinstance(padding, list | tuple) else [padding]
            if any(pads):
                self.reach.shifts = False
        self.reach.readers[self.layers[node]] = labels.reshape(-1, labels.shape[-1])

    def run(self) -> Reach:
        if self.start in self.trace.edited:
            self.reach.fixed = {*range(self.channels)}
            return self.reach
        order = self.trace.position
        waiting = [order[user] for user in self.start.users]
        heapq.heapify(waiting)
        done = set()
        while waiting:
            index = heapq.heappop(waiting)
            node = self.trace.nodes[index]
            if index in done:
                continue
            done.add(index)
            if node in self.layers:
                self.read(node)
                continue
            rule = RULES.get(node.target)
            labels = rule(self, node) if rule and node not in self.trace.edited else None
            if labels is None:
                self.stop(node)
            elif not isinstance(labels, Tensor) or bool((labels >= 0).any()):
                self.labels[node] = labels
                for user in node.users:
                    heapq.heappush(waiting, order[user])
        return self.reach


def _same(walk: _Walk, node: fx.Node) -> Labels | None:
    return walk.of(node.args[0])


def _typed(walk: _Walk, node: fx.Node) -> Labels | None:
    """The values of the first tensor in the type of the second."""
    labels = walk.of(node.args[0])
    return torch.full(shape(node), OTHER, dtype=torch.float64) if labels is None else labels


def _shaped(walk: _Walk, node: fx.Node) -> Labels | None:
    """The values of the first tensor in the shape of the second."""
    labels = walk.of(node.args[0])
    if labels is None:
        return torch.full(shape(node), OTHER, dtype=torch.float64)
    return labels.expand(shape(node)) if node.target is aten.expand_as.default else labels.reshape(shape(node))


def _is_index(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and not value.is_floating_point()


def _moving(walk: _Walk, node: fx.Node) -> Labels | None:
    if any(each not in walk.trace.constants and _is_index(each) for each in node.all_input_nodes):
        return None
    args, kwargs = walk.values(node)
    target = aten.reshape.default if node.target in VIEWS else node.target  # labels are no contiguous tensors
    return target(*args, **kwargs)  # type: ignore[operator]


def _homogeneous(walk: _Walk, node: fx.Node) -> Labels | None:
    if len(walk.labelled(node)) > 1:
        return None
    walk.reach.shifts = walk.reach.linear = False
    return walk.of(node.args[0])


def _limits(walk: _Walk, node: fx.Node) -> Labels | None:
    """ReLU6, if it is a module of its own that reads the channels as the layer before it returns them."""
    labels, owner = walk.of(node.args[0]), walk.trace.owner(node)
    alone = [each for each in walk.trace.owned[owner] if each.target in LIMITS] == [node]
    if not isinstance(walk.trace.net.get_submodule(owner), nn.ReLU6) or not alone or walk.reach.limits:
        return None
    if labels is None or labels.ndim != 4 or labels.shape[1] != walk.channels:
        return None
    in_order = torch.arange(labels.shape[1], dtype=labels.dtype).reshape(1, -1, 1, 1)
    if not torch.equal(labels, in_order.expand_as(labels)):
        return None
    walk.reach.limits.append(owner)
    walk.reach.linear = False
    return labels


def _averaging(walk: _Walk, node: fx.Node) -> Labels | None:
    """Averages over elements of one channel: the labels and their squares must average to a label and its square."""
    args, kwargs = walk.values(node)
    if node.target is aten.sum.dim_IntList:
        walk.reach.shifts = False
        node_mean: Callable[..., Tensor] = aten.mean.dim
    else:
        node_mean = node.target  # type: ignore[assignment]
    mean, square = node_mean(*args, **kwargs), node_mean(args[0].square(), *args[1:], **kwargs)
    label = mean.round()
    alike = (mean - label).abs().max() < 1e-6 and (square - label.square()).abs().max() < 1e-3
    return label if alike else None


def _largest(walk: _Walk, node: fx.Node) -> Labels | None:
    args, kwargs = walk.values(node)
    most, least = (node.target(sign * args[0], *args[1:], **kwargs) for sign in (1, -1))  # type: ignore[operator]
    if not isinstance(most, Tensor) or not torch.equal(most, -least):
        return None
    walk.reach.linear = False
    return most


def _sum(walk: _Walk, node: fx.Node) -> Labels | None:
    one, other = (walk.of(each) for each in node.args[:2])
    if one is None or other is None or node.kwargs:
        return None
    walk.reach.shifts = False
    return one if one.shape == other.shape and torch.equal(one, other) else None


def _product(walk: _Walk, node: fx.Node) -> Labels | None:
    if len(walk.labelled(node)) > 1 or node.args[0] is node.args[1]:
        return None
    labels = next(found for each in node.args[:2] if (found := walk.of(each)) is not None)
    walk.reach.shifts = False
    return labels.expand(shape(node))


def _quotient(walk: _Walk, node: fx.Node) -> Labels | None:
    return _product(walk, node) if walk.of(node.args[0]) is not None else None


def _mixed_tokens(walk: _Walk, node: fx.Node, position: int) -> Labels | None:
    """Labels (..., N, C) of values, of which all N tokens have the same, become those of all queries.

    `position`: that of the values among the arguments; what the other arguments read cannot be scaled.
    """
    for other, each in enumerate([*node.args, *node.kwargs.values()]):
        if other != position:
            walk.fix(each)
    labels = walk.of(node.args[position])
    if labels is None or labels.ndim < 3 or labels.shape[:-2] != torch.Size(shape(node)[:-2]):
        return None
    if not torch.equal(labels, labels[..., :1, :].expand_as(labels)):
        return None
    size = shape(node)
    return labels[..., :1, :].expand(*size[:-2], size[-2], labels.shape[-1]) if len(size) == labels.ndim else None


def _attention(walk: _Walk, node: fx.Node) -> Labels | None:
    walk.reach.attention = walk.reach.attention or walk.of(node.args[2]) is not None
    return _mixed_tokens(walk, node, 2)


def _matrix_product(walk: _Walk, node: fx.Node) -> Labels | None:
    left = source_of(node.args[0], SAME)
    if left is not None and left.target in SOFTMAX:
        walk.reach.attention = True
    else:
        walk.reach.shifts = False
    return _mixed_tokens(walk, node, 1)


def _pad(walk: _Walk, node: fx.Node) -> Labels | None:
    labels, (pads, mode, value) = walk.of(node.args[0]), padding_of(node)
    if not any(pads):
        return labels
    if mode != "constant":
        return aten.pad.default(labels, pads, mode)
    if value:
        return None
    walk.reach.shifts = False
    return aten.constant_pad_nd.default(labels, pads, ZERO)


RULES: dict[object, Callable[[_Walk, fx.Node], Labels | None]] = {
    **dict.fromkeys(SAME, _same), **dict.fromkeys(MOVING, _moving), **dict.fromkeys(HOMOGENEOUS, _homogeneous),
    **dict.fromkeys(LIMITS, _limits), **dict.fromkeys(AVERAGING, _averaging), **dict.fromkeys(LARGEST, _largest),
    **dict.fromkeys(SUMS, _sum), **dict.fromkeys(PRODUCTS, _product), **dict.fromkeys(QUOTIENTS, _quotient),
    **dict.fromkeys(MATRIX_PRODUCTS, _matrix_product), **dict.fromkeys(PADS, _pad),
    aten.scaled_dot_product_attention.default: _attention, aten.type_as.default: _typed,
    **dict.fromkeys((aten.reshape_as.default, aten.view_as.default, aten.expand_as.default), _shaped),
}  # fmt: skip


def reach_of(trace: Trace, start: fx.Node, axis: int, layers: Mapping[fx.Node, str]) -> Reach:
    """Return where the channels of the tensor `start`, along `axis`, go; `layers`: calls of layers and their names."""
    return _Walk(trace, start, axis, layers).run()
