"""Quantization grids: the sets of values that a tensor can be rounded to.

Engines compute with one of them, `QParams` of 8 bits without a zero point; the others are for simulation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from calib.precision import UNROUNDED
from calib.quantizer import QParams, channel_qparams, qparams_from_amax, qparams_from_range

GELU_LEAST = -0.17  # the minimum of GELU is -0.16997, at -0.7518

Sides = tuple[float, float]  # (low, high) of an asymmetric range, as fractions of max(|low|, |high|)


class Grid(Protocol):
    """A set of values that a tensor rounds to."""

    def fake_quantize(self, x: Tensor) -> Tensor:
        """The nearest values of the grid, in the shape and dtype of `x`."""

    def clip(self, x: Tensor) -> Tensor:
        """`x` clamped to the range of the grid, not rounded; same shape."""


class Unrounded:
    """The grid of inputs in weight-only quantization: nothing is rounded or clipped."""

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Return `x` itself."""
        return x

    def clip(self, x: Tensor) -> Tensor:
        """Return `x` itself."""
        return x


@dataclass(frozen=True)
class LogSqrt2:
    """RepQ-ViT's grid of softmax outputs (Li et al., ICCV 2023): levels scale 2^(-k/2), k = 0 .. 2^bits - 1, and 0.

    Values that would need a larger k become 0. The 0 is one level more than `bits` can count; RepQ-ViT's code has it,
    and so have the figures of papers built on it.
    """

    scale: float  # the largest level
    bits: int

    def fake_quantize(self, x: Tensor) -> Tensor:
        """The levels nearest in the log domain, in the shape and dtype of `x`; 0 for x <= 0."""
        k = torch.round(-2 * torch.log2(x / self.scale)).clamp(min=0)
        return torch.where(k < 1 << self.bits, self.scale * torch.exp2(-k / 2), 0.0)  # a NaN (x < 0) is in no range

    def clip(self, x: Tensor) -> Tensor:
        """`x` clamped to 0 .. scale; same shape."""
        return x.clamp(0, self.scale)


@dataclass(frozen=True)
class TwinUniform:
    """Twin uniform quantization (PTQ4ViT, Yuan et al., ECCV 2022).

    One bit tells whether `x` lies below `split`, the other bits count the levels of that half. Most softmax outputs are
    near 0 and few near 1: `below` covers 0 .. split with a small scale, `above` covers 0 .. 1 with a large one. GELU
    outputs have a short negative side, which `below` covers alone.
    """

    below: QParams
    above: QParams
    split: float

    def fake_quantize(self, x: Tensor) -> Tensor:
        """The nearest level of the half that each `x` is in, in the shape and dtype of `x`."""
        return torch.where(x < self.split, self.below.fake_quantize(x), self.above.fake_quantize(x))

    def clip(self, x: Tensor) -> Tensor:
        """`x` clamped to the range of its half; same shape."""
        return torch.where(x < self.split, self.below.clip(x), self.above.clip(x))


@dataclass(frozen=True)
class WeightGroups:
    """Grids of a weight (out, in, ...): every `group` input channels of each output channel have one of their own.

    The grids are asymmetric, as in QwT's rows of language models (section 4.5) and GPTQ's code. `params`: scales and zero
    points, (out * groups,) along axis 0, those of an output channel one behind the other. The last group of a channel may
    be smaller than the others.
    """

    params: QParams
    group: int

    def fake_quantize(self, x: Tensor) -> Tensor:
        """The nearest values of the grids, in the shape and dtype of `x` (out, in, ...)."""
        return self._by_group(x, self.params.fake_quantize)

    def clip(self, x: Tensor) -> Tensor:
        """`x` (out, in, ...) clamped to the ranges of its groups; same shape."""
        return self._by_group(x, self.params.clip)

    def _by_group(self, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        rows = _group_rows(x, self.group)
        return change(rows).reshape(len(x), -1, *x.shape[2:])[:, : x.shape[1]]


def _group_rows(weight: Tensor, group: int) -> Tensor:
    """`weight` (out, in, ...) as one row (out * groups, values) per group; zeros fill up the last group of a channel."""
    after = [0, 0] * (weight.ndim - 2)
    padded = F.pad(weight, (*after, 0, -weight.shape[1] % group))
    return padded.reshape(len(weight) * (padded.shape[1] // group), -1)


def weight_grid(weight: Tensor, bits: int, group: int | None = None) -> Grid:
    """The grid of `weight` (out, in, ...): symmetric per output channel, or asymmetric per `group` input channels.

    A range always includes 0, so that 0 stays on the grid and the zero point within the integers of `bits`.
    """
    if group is None:
        return channel_qparams(weight, bits)
    rows = _group_rows(weight.detach(), group)
    return WeightGroups(qparams_from_range(rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0), 0, bits), group)


def twin_softmax(split: float, bits: int) -> TwinUniform:
    """Twin uniform quantization of softmax outputs, scales split / (2^(bits-1) - 1) and 1 / (2^(bits-1) - 1)."""
    below, above = (qparams_from_range(torch.tensor(0.0), torch.tensor(high), bits=bits - 1) for high in (split, 1.0))
    return TwinUniform(below, above, split)


def twin_gelu(amax: float, bits: int) -> TwinUniform:
    """Twin uniform quantization of GELU outputs, scales -GELU_LEAST / (2^(bits-1) - 1) and amax / (2^(bits-1) - 1)."""
    ranges = ((GELU_LEAST, 0.0), (0.0, amax))
    below, above = (qparams_from_range(torch.tensor(low), torch.tensor(high), bits=bits - 1) for low, high in ranges)
    return TwinUniform(below, above, 0.0)


def sides_of(low: Tensor, high: Tensor) -> Sides:
    """The sides of the range of a tensor whose channels have the minima `low` and maxima `high` (both (C,)).

    The range always includes 0, so that 0 stays on the grid.
    """
    lowest, highest = min(float(low.min()), 0.0), max(float(high.max()), 0.0)
    amax = max(-lowest, highest) or 1.0
    return lowest / amax, highest / amax


def input_grid(amax: float, bits: int, sides: Sides | None = None) -> Grid:
    """The uniform grid of a tensor with max |x| = `amax`: symmetric, or with these `sides`.

    For `bits` = UNROUNDED the tensor is not quantized.
    """
    if bits == UNROUNDED:
        return Unrounded()
    if sides is None:
        return qparams_from_amax(torch.tensor(amax), bits=bits)
    low, high = (torch.tensor(amax * side) for side in sides)
    return qparams_from_range(low, high, bits=bits)


def why_not_int8(grid: Grid) -> str | None:
    """The reason why TensorRT has no INT8 kernel that reads activations on this grid, or None if it has one."""
    if not isinstance(grid, QParams):
        return f"a {type(grid).__name__} grid"
    if grid.bits != 8:
        return f"{grid.bits} bits"
    if grid.zero_point is not None:
        return "a zero point"
    return "a scale per channel" if grid.axis is not None else None


def gradient_of_clipping(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
    """The backward pass of the straight-through estimator: the gradient of x where `ctx` saved True, else 0.

    Rounding counts as the identity; a clipped value has no influence (Bengio et al., 2013).
    """
    (inside,) = ctx.saved_tensors
    return gradients[0] * inside, None


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward(grid.clip(x) == x)
        return grid.fake_quantize(x)

    backward = staticmethod(gradient_of_clipping)


def straight_through(x: Tensor, grid: Grid) -> Tensor:
    """The nearest values of `grid`, in the shape and dtype of `x`, with the gradient of clipping alone."""
    return _StraightThrough.apply(x, grid)
