"""Scale migration between consecutive layers: per-channel scales move without changing the function of the network.

This is cross-layer equalization (Nagel et al., ICCV 2019) between convolutions, and SmoothQuant (Xiao et al., ICML 2023)
behind a norm. One layer with weight W reads a tensor x with channels c. For any r_c > 0 (and shift m_c, where nothing is
padded)

    x' = (x - m) / r        W' = W diag(r)        b' = b + W m        =>   W' x' + b' = W x + b

and the producer of x has to return x' instead: `Norm` absorbs r and m in its affine parameters, `Value` in the rows of v,
`Act` in the rows of the layer before a positively homogeneous activation, and `Insert` adds an element-wise operation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calib.modules import replace_module


class ChannelAffine(nn.Module):
    """The operation (x - shift) / scale per channel of the last axis. An engine fuses it into the activation before it."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.factor = nn.Buffer(1 / scale)
        self.offset = nn.Buffer(-shift / scale)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return x * self.factor + self.offset


class ChannelClamp(nn.Module):
    """A ReLU6 of scaled and shifted channels: x is clamped to low_c .. high_c; a `low` of None stands for 0."""

    def __init__(self, low: Tensor | None, high: Tensor) -> None:
        super().__init__()
        self.low = None if low is None else nn.Buffer(low.reshape(1, -1, 1, 1))
        self.high = nn.Buffer(high.reshape(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return torch.minimum(torch.relu(x) if self.low is None else torch.maximum(x, self.low), self.high)


def _divide_bias(layer: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """Replace the last len(scale) biases b of `layer` by (b - shift) / scale (edits it); a layer without bias has b = 0."""
    if getattr(layer, "bias", None) is None:
        if not shift.any():
            return
        weight = layer.get_parameter("weight")
        layer.bias = nn.Parameter(weight.new_zeros(len(weight)), requires_grad=False)
    layer.get_parameter("bias").data[-len(scale) :].sub_(shift).div_(scale)


@dataclass(frozen=True)
class Move:
    """A place where scale migration is possible, as module names relative to a block.

    `block`: the class of the blocks it applies to, or of the network. `producer`: the module that returns the tensor.
    `consumer`: the layer that reads it.
    """

    block: str
    producer: str
    consumer: str

    def shifts(self, net: nn.Module, producer: str, consumer: str) -> bool:  # noqa: ARG002 - subclasses use them
        """Whether a shift may move as well between these two modules of `net`, named in full."""
        return False

    def applies(self, block: nn.Module) -> bool:  # noqa: ARG002 - subclasses use it
        """Whether scale migration preserves the function of this block."""
        return True

    def produce(self, net: nn.Module, producer: str, scale: Tensor, shift: Tensor) -> None:
        """Make `producer` return (x - shift) / scale instead of x, both (C,) (edits `net`)."""
        raise NotImplementedError


class Norm(Move):
    """Scale migration into the affine parameters of a LayerNorm, as in SmoothQuant."""

    def shifts(self, net: nn.Module, producer: str, consumer: str) -> bool:  # noqa: ARG002
        """Return True: the bias of the norm absorbs any shift."""
        return True

    def produce(self, net: nn.Module, producer: str, scale: Tensor, shift: Tensor) -> None:
        """Set gamma' = gamma / scale and beta' = (beta - shift) / scale (edits `net`)."""
        norm = net.get_submodule(producer)
        norm.get_parameter("weight").data.div_(scale)
        norm.get_parameter("bias").data.sub_(shift).div_(scale)


class Value(Move):
    """Scale migration into the rows of v in a packed qkv.

    It is exact because attention mixes tokens, never channels, with weights that sum to 1.
    """

    def produce(self, net: nn.Module, producer: str, scale: Tensor, shift: Tensor) -> None:
        """Divide the last len(scale) rows by `scale`, after subtracting `shift` from their biases (edits `net`)."""
        qkv = net.get_submodule(producer)
        qkv.get_parameter("weight").data[-len(scale) :].div_(scale[:, None])
        _divide_bias(qkv, scale, shift)


class Insert(Move):
    """Scale migration into a new element-wise operation, in the place of a module without effect (a Dropout)."""

    def shifts(self, net: nn.Module, producer: str, consumer: str) -> bool:  # noqa: ARG002
        """Return True: the new operation subtracts any shift."""
        return True

    def produce(self, net: nn.Module, producer: str, scale: Tensor, shift: Tensor) -> None:
        """Put a ChannelAffine in the place of `producer` (edits `net`)."""
        replace_module(net, producer, ChannelAffine(scale, shift))


@dataclass(frozen=True)
class Moved:
    """One scale migration that was made: `scale` r and `shift` m, both (C,), of the tensor between two modules of a net."""

    producer: str
    consumer: str
    scale: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Act(Move):
    """Scale migration into the rows of the layer before `activation`, which is ReLU, ReLU6 or Identity.

    A shift moves into the limits of a ReLU6, which become per-channel anyway: ReLU6(x) - m = clamp(x - m, -m, 6 - m).
    With it, symmetric INT8 uses its whole range; without it, the negative integers would stand for values that a ReLU6
    never returns. A ReLU is left without shift, because engines merge it into the convolution, and a tensor that the next
    convolution pads with zeros cannot be shifted.
    """

    activation: str  # name relative to the parent of the producer
    gate: str = ""  # a squeeze-excite, which must be an Identity: it would read the scaled values

    def applies(self, block: nn.Module) -> bool:
        """Whether the activation is positively homogeneous (or ReLU6) and there is no gate."""
        parent = block.get_submodule(self.producer.rpartition(".")[0])
        passes = isinstance(parent.get_submodule(self.activation), nn.ReLU | nn.ReLU6 | nn.Identity)
        return passes and (not self.gate or isinstance(block.get_submodule(self.gate), nn.Identity))

    def _activation(self, producer: str) -> str:
        name = producer.rpartition(".")[0]
        return f"{name}.{self.activation}" if name else self.activation

    def shifts(self, net: nn.Module, producer: str, consumer: str) -> bool:
        """Whether the activation is a ReLU6 and the consumer a convolution without padding."""
        reader = net.get_submodule(consumer)
        unpadded = isinstance(reader, nn.Conv2d) and reader.padding == (0, 0)
        return unpadded and isinstance(net.get_submodule(self._activation(producer)), nn.ReLU6)

    def produce(self, net: nn.Module, producer: str, scale: Tensor, shift: Tensor) -> None:
        """Divide rows and biases by `scale`, after subtracting `shift` from the biases; a ReLU6 gets per-channel limits."""
        layer = net.get_submodule(producer)
        layer.get_parameter("weight").data.div_(scale.reshape(-1, 1, 1, 1))
        _divide_bias(layer, scale, shift)
        activation = self._activation(producer)
        if isinstance(net.get_submodule(activation), nn.ReLU6):
            low = -shift / scale if shift.any() else None
            replace_module(net, activation, ChannelClamp(low, (6 - shift) / scale))
