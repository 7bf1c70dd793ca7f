"""Checks the FP16 range of the float network: an engine runs everything in FP16 that is not quantized.

The check observes every torch function that a forward pass calls, together with the module it is called from: layers,
norms, activations, residual additions, explicit matrix products, and the scores q k^T, which a fused attention does not
return (they are computed separately). It does not observe the sums inside an operation: TensorRT accumulates products and
normalisations in FP32, so only the results of operations can overflow.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from calib.errors import UserError
from calib.hooks import removed

FP16_MAX = 65504.0
FP16_SMALLEST_NORMAL = 2.0**-14  # below it, every halving loses one of the 11 significant bits
MARGIN = 8.0  # other images exceed the largest value of a few images, but rarely eightfold


def _scores(query: Tensor, key: Tensor, *_: Any, scale: float | None = None, **__: Any) -> Tensor:
    """The attention scores q k^T times scale, as the exported graph computes them."""
    if key.shape[-3] < query.shape[-3]:  # grouped queries: every head of keys serves several
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    return query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)


class _Watch(TorchFunctionMode):
    """Records the largest |value| that any torch function returns, by the module that calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[str] = []  # modules whose forward pass is running, innermost last
        self.largest: dict[str, float] = {}

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if self.running:
            self._see(self.running[-1], found)
            if function is F.scaled_dot_product_attention:
                self._see(f"{self.running[-1]} (attention scores)", _scores(*args, **(kwargs or {})))
        return found

    def _see(self, module: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            held = value.detach()
            low, high = (float(each) for each in torch.aminmax(held))
            if low == -math.inf:  # a mask of attention, which FP16 holds as well
                low, high = (float(each) for each in torch.aminmax(torch.where(held == -math.inf, 0.0, held)))
            # NaN compares as false: the expression is written so that a NaN replaces any number and is kept
            before, now = self.largest.get(module, 0.0), max(-low, high)
            self.largest[module] = before if before > now or before != before else now


@contextmanager
def watched(net: nn.Module) -> Iterator[dict[str, float]]:
    """Yield a dict, module name -> largest |value| computed in it, that forward passes of `net` fill inside the block."""
    watch = _Watch()
    handles = []
    for name, module in net.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: watch.running.append(name or "net")))
        handles.append(module.register_forward_hook(lambda *_: watch.running.pop() and None))
    with removed(handles), watch:
        yield watch.largest


@dataclass(frozen=True)
class Fp16Range:
    """The module with the `largest` |value| on `images` images, and weights below FP16's normal numbers.

    `subnormal`: (name, largest |value|) of weight tensors all of whose values FP16 holds with fewer significant bits.
    """

    module: str
    largest: float
    images: int
    subnormal: tuple[tuple[str, float], ...] = ()

    @property
    def headroom(self) -> float:
        """The factor by which all values could grow before FP16 overflows."""
        return FP16_MAX / max(self.largest, 1e-30)

    def warnings(self) -> list[str]:
        """One sentence for each way in which the network comes close to the limits of FP16."""
        found = []
        if self.headroom < MARGIN:
            found.append(
                f"FP16 is nearly full: '{self.module}' reaches {self.largest:.4g} of {FP16_MAX:.0f} on {self.images} "
                f"calibration images, other images may overflow"
            )
        if self.subnormal:
            name, value = self.subnormal[0]
            found.append(
                f"{len(self.subnormal)} weight tensors lie below FP16's normal numbers and lose bits (largest |value| "
                f"{value:.1e} in '{name}')"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain values for the report."""
        return {
            "module": self.module,
            "largest": self.largest,
            "headroom": round(self.headroom, 3),
            "images": self.images,
            "subnormal": [name for name, _ in self.subnormal],
        }


def require_fp16_weights(net: nn.Module) -> tuple[tuple[str, float], ...]:
    """(name, largest |value|) of floating-point tensors all of whose values are subnormal in FP16.

    Raises UserError for one that FP16 cannot hold. Inf in a buffer is a mask or a limit, which FP16 holds as well.
    """
    subnormal, parameters = [], dict(net.named_parameters())
    for name, tensor in [*parameters.items(), *net.named_buffers()]:
        values = tensor.detach() if tensor.is_floating_point() else tensor.new_zeros(0)
        if name not in parameters:
            values = values[~values.isinf()]
        largest = float(values.abs().max()) if values.numel() else 0.0
        if not largest <= FP16_MAX:
            raise UserError(
                f"'{name}' holds {largest:.3g}, beyond FP16's {FP16_MAX:.0f}: the engine would compute "
                f"Inf; rescale this layer before export, or give FLOAT=fp32"
            )
        if 0 < largest < FP16_SMALLEST_NORMAL:
            subnormal.append((name, largest))
    return tuple(subnormal)


def fp16_range(net: nn.Module, batches: Iterable[Tensor], must_fit: bool = True) -> Fp16Range:
    """The range of the float network `net` on `batches` (B, 3, H, W).

    Raises UserError if it `must_fit` and FP16 would overflow, or FP32 does; the message names the module and the value.
    """
    subnormal = require_fp16_weights(net) if must_fit else ()
    images = 0
    with torch.inference_mode(), watched(net) as largest:
        for batch in batches:
            net(batch)
            images += len(batch)
    for module, value in largest.items():  # in order of execution: the first one is the cause
        if must_fit and not math.isfinite(value):
            raise UserError(
                f"'{module}' computes {value} on the calibration images, in FP32 already: expected finite values, and "
                f"minus infinity in masks alone; mend the network, or give FLOAT=fp32, whose engine computes what it does"
            )
        if must_fit and not value <= FP16_MAX:
            raise UserError(
                f"'{module}' reaches {value:.4g} on {images} calibration images, beyond FP16's {FP16_MAX:.0f}: an FP16 "
                f"engine would compute Inf; give FLOAT=fp32, whose engines have FP32 types beside INT8"
            )
    module = max(largest, key=lambda name: largest[name])
    return Fp16Range(module, largest[module], images, subnormal)
