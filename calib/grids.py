"""What a tensor can round to. `QParams` with 8 bits and no zero point is what engines run; a simulation may take others."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from calib.precision import UNROUNDED
from calib.quantizer import QParams, qparams_from_amax, qparams_from_range

GELU_LEAST = -0.17  # -0.16997 at -0.7518

Sides = tuple[float, float]  # the ends of an asymmetric range, as fractions of the larger |end|


class Grid(Protocol):
    """A set of values that a tensor rounds to."""

    def fake_quantize(self, x: Tensor) -> Tensor:
        """The nearest values of the grid, in the dtype of `x`."""

    def clip(self, x: Tensor) -> Tensor:
        """`x` kept within the range of the grid, not rounded."""


class Unrounded:
    """No grid at all: of inputs in weight-only quantization."""

    def fake_quantize(self, x: Tensor) -> Tensor:
        """`x`."""
        return x

    def clip(self, x: Tensor) -> Tensor:
        """`x`."""
        return x


@dataclass(frozen=True)
class LogSqrt2:
    """Levels scale 2^(-k/2) for k = 0 .. 2^bits - 1, and 0 for what would need a larger k: softmax outputs in RepQ-ViT.

    The 0 is one level more than bits can count; RepQ-ViT's code has it, and so have the figures in papers built on it.
    """

    scale: float  # the largest level
    bits: int

    def fake_quantize(self, x: Tensor) -> Tensor:
        """The level nearest in the log domain, in the dtype of `x`; 0 for x <= 0."""
        k = torch.round(-2 * torch.log2(x / self.scale)).clamp(min=0)
        return torch.where(k < 1 << self.bits, self.scale * torch.exp2(-k / 2), 0.0)  # a NaN (x < 0) is in no range

    def clip(self, x: Tensor) -> Tensor:
        """`x` within 0 .. scale."""
        return x.clamp(0, self.scale)


@dataclass(frozen=True)
class TwinUniform:
    """PTQ4ViT's twin uniform grid: one bit tells whether `x` lies below `split`, the others count levels from 0 there.

    Softmax outputs are many near 0 and few near 1: `below` covers 0 .. split in fine steps, `above` 0 .. 1 in coarse ones.
    GELU outputs have a short negative side: `below` covers that alone.
    """

    below: QParams
    above: QParams
    split: float

    def fake_quantize(self, x: Tensor) -> Tensor:
        """The nearest level of the half that `x` is in, in the dtype of `x`."""
        return torch.where(x < self.split, self.below.fake_quantize(x), self.above.fake_quantize(x))

    def clip(self, x: Tensor) -> Tensor:
        """`x` within the range of its half."""
        return torch.where(x < self.split, self.below.clip(x), self.above.clip(x))


def twin_softmax(split: float, bits: int) -> TwinUniform:
    """The twin grid of softmax outputs, steps split / (2^(bits-1) - 1) and 1 / (2^(bits-1) - 1)."""
    below, above = (qparams_from_range(torch.tensor(0.0), torch.tensor(end), bits=bits - 1) for end in (split, 1.0))
    return TwinUniform(below, above, split)


def twin_gelu(amax: float, bits: int) -> TwinUniform:
    """The twin grid of GELU outputs, steps -GELU_LEAST / (2^(bits-1) - 1) and amax / (2^(bits-1) - 1)."""
    ends = ((GELU_LEAST, 0.0), (0.0, amax))
    below, above = (qparams_from_range(torch.tensor(low), torch.tensor(high), bits=bits - 1) for low, high in ends)
    return TwinUniform(below, above, 0.0)


def sides_of(low: Tensor, high: Tensor) -> Sides:
    """How far a tensor with channel extremes `low` and `high` (C,) reaches on either side of 0, which stays on the grid."""
    ends = min(float(low.min()), 0.0), max(float(high.max()), 0.0)
    reach = max(-ends[0], ends[1]) or 1.0
    return ends[0] / reach, ends[1] / reach


def input_grid(amax: float, bits: int, sides: Sides | None = None) -> Grid:
    """The grid of a tensor that reaches `amax`: symmetric, or with these `sides`; none for `bits` = UNROUNDED."""
    if bits == UNROUNDED:
        return Unrounded()
    if sides is None:
        return qparams_from_amax(torch.tensor(amax), bits=bits)
    low, high = (torch.tensor(amax * side) for side in sides)
    return qparams_from_range(low, high, bits=bits)


def why_not_int8(grid: Grid) -> str | None:
    """Why TensorRT has no INT8 kernel that reads activations on this grid, or None."""
    if not isinstance(grid, QParams):
        return f"a {type(grid).__name__} grid"
    if grid.bits != 8:
        return f"{grid.bits} bits"
    if grid.zero_point is not None:
        return "a zero point"
    return "a scale per channel" if grid.axis is not None else None


class _StraightThrough(torch.autograd.Function):
    """Rounding passes gradients on as they are, clipping stops them (Bengio et al., 2013)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward(grid.clip(x) == x)
        return grid.fake_quantize(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None


def straight_through(x: Tensor, grid: Grid) -> Tensor:
    """`x` rounded to `grid`, with the gradient of clipping alone."""
    return _StraightThrough.apply(x, grid)
