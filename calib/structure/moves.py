"""Scale migration between consecutive layers: per-channel scales move without changing the function of the network.

This is cross-layer equalization (Nagel et al., ICCV 2019) between convolutions, and SmoothQuant (Xiao et al., ICML 2023)
behind a norm. One layer with weight W reads a tensor x with channels c. For any r_c > 0 (and shift m_c, where nothing is
padded)

    x' = (x - m) / r        W' = W diag(r)        b' = b + W m        =>   W' x' + b' = W x + b

and the producer of x has to return x' instead. A norm absorbs r and m in its affine parameters, a layer in its rows and
biases, if what lies between is positively homogeneous. Elsewhere an element-wise operation is added: behind an activation,
or in front of the readers, where something else reads x as it is, as a residual sum does behind the norm of BERT's blocks,
or where a concatenation puts channels of several producers side by side.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calib.modules import replace_module
from calib.structure.in_front import in_front, put_in_front


class ChannelAffine(nn.Module):
    """The operation (x - shift) / scale per channel on what `before` returns: an activation, or what a layer reads.

    `scale` and `shift` have a shape that broadcasts over x.
    """

    def __init__(self, before: nn.Module, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.before = before
        self.factor = nn.Buffer(1 / scale)
        self.offset = nn.Buffer(-shift / scale)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return what `before` returns, shifted and scaled, in the same shape."""
        return self.before(*args, **kwargs) * self.factor + self.offset


class ChannelClamp(nn.Module):
    """A ReLU6 of scaled and shifted channels: x is clamped to low_c .. high_c; a `low` of None stands for 0."""

    def __init__(self, low: Tensor | None, high: Tensor) -> None:
        super().__init__()
        self.low = None if low is None else nn.Buffer(low.reshape(1, -1, 1, 1))
        self.high = nn.Buffer(high.reshape(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return torch.minimum(torch.relu(x) if self.low is None else torch.maximum(x, self.low), self.high)


NORM, LAYER, INSERT, FRONT = "norm", "layer", "insert", "front"


@dataclass(frozen=True)
class Place:
    """Where a tensor can be scaled per channel: all that has to change with it.

    `kind`: what absorbs the scale, a norm or layer called `producer`, or an operation that is added, behind the activation
    `producer` or in front of each reader of what `producer` computes. `rows`: the producer's channel that each channel of
    the readers is. `readers`: all layers that read it. `shifts`: whether a shift can move as well. `limits`: a ReLU6 on the
    way, which gets limits per channel. `axis`: that of the channels where an operation is added, counted from the last.
    `attention`: whether an attention lies between, which mixes tokens with weights that sum to 1, never channels.
    """

    kind: str
    producer: str
    rows: tuple[int, ...]
    readers: tuple[str, ...]
    shifts: bool
    limits: tuple[str, ...] = ()
    axis: int = -1
    attention: bool = False


@dataclass(frozen=True)
class Moved:
    """One scale migration that was made: `scale` r and `shift` m, both (C,), of what all `readers` of a `producer` read."""

    producer: str
    readers: tuple[str, ...]
    scale: Tensor
    shift: Tensor


def along_inputs(layer: nn.Module, values: Tensor) -> Tensor:
    """`values` (C,), one per input channel of a Linear or convolution, in a shape that broadcasts over its weight."""
    weight = layer.get_parameter("weight")
    groups = int(getattr(layer, "groups", 1))
    by_output = values.reshape(groups, 1, -1).expand(-1, len(weight) // groups, -1)
    return by_output.reshape(len(weight), -1, *[1] * (weight.ndim - 2))


def _add_bias(module: nn.Module) -> None:
    """Give `module` a bias of zeros if it has none (edits it)."""
    if getattr(module, "bias", None) is None:
        weight = module.get_parameter("weight")
        module.bias = nn.Parameter(weight.new_zeros(len(weight)), requires_grad=False)


def produce(net: nn.Module, place: Place, scale: Tensor, shift: Tensor) -> None:
    """Make what is read at `place` (x - shift) / scale instead of x, both (C,) (edits `net`)."""
    if place.kind in (FRONT, INSERT):
        along = [-1, *[1] * (-1 - place.axis)]
        factors = scale.reshape(along), shift.reshape(along)
        if place.kind == INSERT:
            replace_module(net, place.producer, ChannelAffine(net.get_submodule(place.producer), *factors))
            return
        for name in place.readers:
            layer = net.get_submodule(name)
            put_in_front(layer, ChannelAffine(in_front(layer) or nn.Identity(), *factors))
        return
    producer, rows = net.get_submodule(place.producer), list(place.rows)
    weight = producer.get_parameter("weight").data
    weight[rows] /= scale.reshape(-1, *[1] * (weight.ndim - 1))
    if shift.any():
        _add_bias(producer)
    if getattr(producer, "bias", None) is not None:
        bias = producer.get_parameter("bias").data
        bias[rows] = (bias[rows] - shift) / scale
    for name in place.limits:
        full_scale, full_shift = scale.new_ones(len(weight)), shift.new_zeros(len(weight))
        full_scale[rows], full_shift[rows] = scale, shift
        low = -full_shift / full_scale if shift.any() else None
        replace_module(net, name, ChannelClamp(low, (6 - full_shift) / full_scale))


def consume(layer: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """Make `layer` read (x - shift) / scale instead of x (edits it)."""
    weight = layer.get_parameter("weight").data
    if shift.any():
        moved = (weight * along_inputs(layer, shift)).flatten(1).sum(1)
        _add_bias(layer)
        layer.get_parameter("bias").data.add_(moved)
    weight.mul_(along_inputs(layer, scale))


def move(net: nn.Module, place: Place, scale: Tensor, shift: Tensor) -> None:
    """Move `scale` and `shift`, both (C,), from what is read at `place` into what reads it (edits `net`)."""
    produce(net, place, scale, shift)
    for name in place.readers:
        consume(net.get_submodule(name), scale, shift)
