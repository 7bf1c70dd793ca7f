"""Per-channel scales that move between neighbours without changing the function.

A tensor x with channels c is read by one layer with weight W. For any r_c > 0 (and shift m_c, where nothing is padded)

    x' = (x - m) / r        W' = W diag(r)        b' = b + W m        =>   W' x' + b' = W x + b

and whatever produces x has to produce x' instead: `Norm` in its affine parameters, `Value` in the rows of v, `Act` in the
rows of the layer before a positively homogeneous activation, `Insert` in an element-wise operation of its own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calib.modules import replace_module


class ChannelAffine(nn.Module):
    """(x - shift) / scale over the last axis; an engine fuses it into the activation before it."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.factor = nn.Buffer(1 / scale)
        self.offset = nn.Buffer(-shift / scale)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return x * self.factor + self.offset


class ChannelClamp(nn.Module):
    """ReLU6 in scaled and shifted channels: low_c <= x <= high_c; `low` None: 0, a ReLU."""

    def __init__(self, low: Tensor | None, high: Tensor) -> None:
        super().__init__()
        self.low = None if low is None else nn.Buffer(low.reshape(1, -1, 1, 1))
        self.high = nn.Buffer(high.reshape(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return torch.minimum(torch.relu(x) if self.low is None else torch.maximum(x, self.low), self.high)


def _divide_bias(layer: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """The last of `layer`'s biases, as many as `scale` has, become (b - shift) / scale (edits it); 0 where it has none."""
    if getattr(layer, "bias", None) is None:
        if not shift.any():
            return
        weight = layer.get_parameter("weight")
        layer.bias = nn.Parameter(weight.new_zeros(len(weight)), requires_grad=False)
    layer.get_parameter("bias").data[-len(scale) :].sub_(shift).div_(scale)


@dataclass(frozen=True)
class Move:
    """A place where channels can be rescaled, as names relative to a block (`..` = the network).

    `block`: class of the blocks it applies to. `consumer`: the layer that reads the tensor.
    """

    block: str
    producer: str
    consumer: str

    def shifts(self, net: nn.Module, producer: str, consumer: str) -> bool:  # noqa: ARG002 - some moves look
        """Whether a shift may move as well, between these layers of `net`."""
        return False

    def applies(self, block: nn.Module) -> bool:  # noqa: ARG002 - some moves look
        """Whether the move keeps the function in this very block."""
        return True

    def produce(self, net: nn.Module, producer: str, scale: Tensor, shift: Tensor) -> None:
        """Make `producer` yield (x - shift) / scale (edits `net`)."""
        raise NotImplementedError


class Norm(Move):
    """Into the affine parameters of a LayerNorm."""

    def shifts(self, net: nn.Module, producer: str, consumer: str) -> bool:  # noqa: ARG002
        """Always."""
        return True

    def produce(self, net: nn.Module, producer: str, scale: Tensor, shift: Tensor) -> None:
        """gamma' = gamma / scale, beta' = (beta - shift) / scale."""
        norm = net.get_submodule(producer)
        norm.get_parameter("weight").data.div_(scale)
        norm.get_parameter("bias").data.sub_(shift).div_(scale)


class Value(Move):
    """Into the rows of v in a packed qkv: attention mixes tokens, never channels, with weights that sum to 1."""

    def produce(self, net: nn.Module, producer: str, scale: Tensor, shift: Tensor) -> None:
        """The last third of the rows is divided by `scale`, after `shift` is taken from their bias."""
        qkv = net.get_submodule(producer)
        qkv.get_parameter("weight").data[-len(scale) :].div_(scale[:, None])
        _divide_bias(qkv, scale, shift)


class Insert(Move):
    """Into a new element-wise operation in place of a module that does nothing (a Dropout)."""

    def shifts(self, net: nn.Module, producer: str, consumer: str) -> bool:  # noqa: ARG002
        """Always."""
        return True

    def produce(self, net: nn.Module, producer: str, scale: Tensor, shift: Tensor) -> None:
        """Put a ChannelAffine there."""
        replace_module(net, producer, ChannelAffine(scale, shift))


@dataclass(frozen=True)
class Moved:
    """A move with its numbers: `scale` r and `shift` m, both (C,), of the tensor between two layers named in full."""

    producer: str
    consumer: str
    scale: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Act(Move):
    """Into the rows of the layer before `activation`, which is ReLU, ReLU6 or nothing.

    A shift goes into the limits of a ReLU6, which are per channel anyway: ReLU6(x) - m = clamp(x - m, -m, 6 - m). Half of
    the integers would stand for values that a ReLU6 never returns. A ReLU stays the ReLU that engines merge into the
    convolution, and what a convolution pads with zeros cannot be shifted.
    """

    activation: str  # relative to the producer's parent
    gate: str = ""  # a squeeze-excite that must be absent (Identity): it reads absolute values

    def applies(self, block: nn.Module) -> bool:
        """Whether activation and gate let a scale through."""
        parent = block.get_submodule(self.producer.rpartition(".")[0])
        passes = isinstance(parent.get_submodule(self.activation), nn.ReLU | nn.ReLU6 | nn.Identity)
        return passes and (not self.gate or isinstance(block.get_submodule(self.gate), nn.Identity))

    def _activation(self, producer: str) -> str:
        name = producer.rpartition(".")[0]
        return f"{name}.{self.activation}" if name else self.activation

    def shifts(self, net: nn.Module, producer: str, consumer: str) -> bool:
        """Behind a ReLU6, before a convolution that pads nothing."""
        reader = net.get_submodule(consumer)
        unpadded = isinstance(reader, nn.Conv2d) and reader.padding == (0, 0)
        return unpadded and isinstance(net.get_submodule(self._activation(producer)), nn.ReLU6)

    def produce(self, net: nn.Module, producer: str, scale: Tensor, shift: Tensor) -> None:
        """Rows and bias are divided by `scale`, after `shift` is taken from the bias; a ReLU6 gets limits per channel."""
        layer = net.get_submodule(producer)
        layer.get_parameter("weight").data.div_(scale.reshape(-1, 1, 1, 1))
        _divide_bias(layer, scale, shift)
        activation = self._activation(producer)
        if isinstance(net.get_submodule(activation), nn.ReLU6):
            low = -shift / scale if shift.any() else None
            replace_module(net, activation, ChannelClamp(low, (6 - shift) / scale))
