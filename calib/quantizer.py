"""Uniform quantization. A TensorRT INT8 kernel computes it with 8 bits and without a zero point:

    q = clamp(round_half_even(x / scale), low, 127)        x^ = scale * q

`low` is -128 for activations and -127 for weights: the narrow range lets a row change its sign without
overflow. The engine stores scales in FP16, so a scale is rounded to FP16 *before* any integer is computed;
simulation and engine then use the same number.

Fewer bits b give -2^(b-1) .. 2^(b-1) - 1, and a zero point z an asymmetric range: q = clamp(round(x / scale) + z) and
x^ = scale * (q - z). Weights of fewer bits still run as INT8; everything else is simulated (calib/grids.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

QMAX = 127


def largest_integer(bits: int) -> int:
    """The largest signed integer of `bits` bits, 2^(bits - 1) - 1."""
    return (1 << (bits - 1)) - 1


# Below this an FP16 scale is subnormal with less than 6 significant bits: too coarse to be a scale.
SMALLEST_SCALE = 2.0**-18


@dataclass(frozen=True)
class QParams:
    """The parameters with which one tensor is quantized to signed integers of `bits` bits.

    `scale` is () for one scale per tensor or (C,) for one scale per channel along `axis`, float32 with values that FP16
    holds exactly. `narrow` excludes the smallest integer, so that 8 bits give [-127, 127]. `zero_point` has the shape of
    `scale` and holds integers, which lie outside the range of `bits` where all of x is on one side of 0; None stands for 0.
    """

    scale: Tensor
    axis: int | None = None
    narrow: bool = False
    bits: int = 8
    zero_point: Tensor | None = None

    @property
    def high(self) -> int:
        """The largest integer of the grid."""
        return largest_integer(self.bits)

    @property
    def low(self) -> int:
        """The smallest integer of the grid."""
        return -self.high if self.narrow else -self.high - 1

    def fake_quantize(self, x: Tensor) -> Tensor:
        """The nearest values of the grid, dequantize(quantize(x)), in the shape and dtype of `x`."""
        return dequantize(quantize(x, self), self).to(x.dtype)

    def clip(self, x: Tensor) -> Tensor:
        """`x` clamped to the range of the grid, not rounded; same shape."""
        scale, zero_point = _along(self, x.ndim)
        if zero_point is None:
            return torch.clamp(x, scale * self.low, scale * self.high)
        return torch.clamp(x, scale * (self.low - zero_point), scale * (self.high - zero_point))


def fp16_scale(scale: Tensor) -> Tensor:
    """The nearest FP16 values of `scale` (any shape), at least `SMALLEST_SCALE`, as float32.

    One that FP16 cannot hold stays as it is: it is of an engine with FP32 types.
    """
    single = scale.float().clamp(min=SMALLEST_SCALE)
    half = single.half().float()
    return torch.where(half.isinf(), single, half)


def qparams_from_amax(amax: Tensor, axis: int | None = None, narrow: bool = False, bits: int = 8) -> QParams:
    """Symmetric parameters whose largest integer stands for `amax` (() or (C,), in the unit of the data)."""
    return QParams(fp16_scale(amax / largest_integer(bits)), axis, narrow, bits)


def qparams_from_range(low: Tensor, high: Tensor, axis: int | None = None, bits: int = 8) -> QParams:
    """Asymmetric parameters whose integers stand for `low` .. `high` (both () or (C,), in the unit of the data).

    The zero point is rounded but not clipped, so that a range on one side of 0 keeps all its levels.
    """
    scale = fp16_scale((high - low) / ((1 << bits) - 1))
    return QParams(scale, axis, bits=bits, zero_point=-largest_integer(bits) - 1 - torch.round(low / scale))


def channel_qparams(weight: Tensor, bits: int = 8) -> QParams:
    """Narrow-range parameters with one scale per output channel of `weight` (out, ...): max |w| of a channel is `high`."""
    return qparams_from_amax(weight.detach().abs().flatten(1).amax(1), axis=0, narrow=True, bits=bits)


def _broadcast(scale: Tensor, axis: int | None, ndim: int) -> Tensor:
    if axis is None:
        return scale
    shape = [1] * ndim
    shape[axis] = -1
    return scale.reshape(shape)


def _along(qparams: QParams, ndim: int) -> tuple[Tensor, Tensor | None]:
    """(scale, zero point if there is one) in a shape that broadcasts over a tensor with `ndim` dimensions."""
    zero_point = None if qparams.zero_point is None else _broadcast(qparams.zero_point, qparams.axis, ndim)
    return _broadcast(qparams.scale, qparams.axis, ndim), zero_point


def quantize(x: Tensor, qparams: QParams) -> Tensor:
    """The integers q of `x` (any shape), int8 in the same shape."""
    scale, zero_point = _along(qparams, x.ndim)
    steps = torch.round(x / scale.to(x.dtype))
    return (steps if zero_point is None else steps + zero_point).clamp(qparams.low, qparams.high).to(torch.int8)


def dequantize(q: Tensor, qparams: QParams) -> Tensor:
    """The real values x^ of the integers `q` (any shape), in the same shape and the dtype of the scale."""
    scale, zero_point = _along(qparams, q.ndim)
    steps = q.to(scale.dtype)
    return (steps if zero_point is None else steps - zero_point) * scale
