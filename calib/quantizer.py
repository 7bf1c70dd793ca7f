"""Symmetric uniform quantization: the only arithmetic a TensorRT INT8 kernel runs.

    q = clamp(round_half_even(x / scale), low, 127)        x^ = scale * q

`low` is -128 for activations and -127 for weights: the narrow range lets a row change its sign without
overflow. Scales are stored in FP16 by the engine, so they are rounded to FP16 *before* any integer is
computed; the integers and the engine then use one and the same number.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

QMAX = 127

# Below this an FP16 scale is subnormal with less than 6 significant bits: too coarse to be a scale.
SMALLEST_SCALE = 2.0**-18


@dataclass(frozen=True)
class QParams:
    """How one tensor rounds to signed 8-bit integers.

    `scale` is () for a tensor-wide scale or (C,) for one scale per channel along `axis`, float32 holding
    exact FP16 values. `narrow` restricts the integers to [-127, 127].
    """

    scale: Tensor
    axis: int | None = None
    narrow: bool = False

    @property
    def low(self) -> int:
        """Smallest integer."""
        return -QMAX if self.narrow else -QMAX - 1


def fp16_scale(scale: Tensor) -> Tensor:
    """`scale` floored at `SMALLEST_SCALE` and rounded to the nearest FP16 value, returned as float32."""
    return scale.float().clamp(min=SMALLEST_SCALE).half().float()


def qparams_from_amax(amax: Tensor, axis: int | None = None, narrow: bool = False) -> QParams:
    """Parameters whose largest integer stands for `amax` (() or (C,), same unit as the data)."""
    return QParams(fp16_scale(amax / QMAX), axis, narrow)


def channel_qparams(weight: Tensor) -> QParams:
    """Narrow-range parameters per output channel of `weight` (out, ...)."""
    return qparams_from_amax(weight.detach().abs().flatten(1).amax(1), axis=0, narrow=True)


def _broadcast(scale: Tensor, axis: int | None, ndim: int) -> Tensor:
    if axis is None:
        return scale
    shape = [1] * ndim
    shape[axis] = -1
    return scale.reshape(shape)


def quantize(x: Tensor, qparams: QParams) -> Tensor:
    """Integers of `x` (any shape) as int8 of the same shape."""
    scale = _broadcast(qparams.scale, qparams.axis, x.ndim).to(x.dtype)
    return torch.round(x / scale).clamp(qparams.low, QMAX).to(torch.int8)


def dequantize(q: Tensor, qparams: QParams) -> Tensor:
    """Real values of the integers `q`, in the dtype of the scale."""
    return q.to(qparams.scale.dtype) * _broadcast(qparams.scale, qparams.axis, q.ndim)


def fake_quantize(x: Tensor, qparams: QParams) -> Tensor:
    """`x` rounded to the grid of `qparams`: dequantize(quantize(x)) in the dtype of `x`."""
    return dequantize(quantize(x, qparams), qparams).to(x.dtype)
