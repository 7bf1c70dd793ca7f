"""A layer whose rounding can be learned: AdaQTransform's general form (eq. 8 with decoupled scales as in eq. 5).

    y^ = xi W^ x^ + b + eta        W^ = s' clamp(floor(w / s) + h(alpha))        x^ = s_x clamp(round(x / s_x))

s, s', xi and eta have one value per output channel, s_x one per tensor. xi s' is a single number, so one quantity stands
for both. `QUANTITIES` names what can be learned; scales are learned as factors of their initial values. Scales are
rounded to FP16, as an engine stores them, with the straight-through gradient.

The result folds into a `RoundedLayer`: integers, one scale per channel and a bias, with no additional node in the graph.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib.grids import Grid, straight_through
from calib.learned.soft_rounding import alpha_of, hard_rounding, soft_rounding
from calib.network.layer_rows import weight_matrix
from calib.network.rounded_layer import RoundedLayer, with_gain_and_offset
from calib.quantizer import QParams, fp16_scale

ROUNDING, SCALE, QUANT_SCALE, DEQUANT_SCALE, OFFSET, INPUT_SCALE = QUANTITIES = (
    "rounding",  # alpha: whether a weight rounds down or up
    "scale",  # s and s' as one number
    "quant_scale",  # s, which divides the weights to give the integers
    "dequant_scale",  # s' (or xi), which multiplies the integers
    "offset",  # eta
    "input_scale",  # s_x
)
SMALLEST_FACTOR = 0.01  # of xi and of the scales, relative to their initial values: a scale stays positive


@dataclass
class Mode:
    """The current mode of all learned layers of one network."""

    soft: bool = False  # True while learning: h lies between 0 and 1; else it is 0 or 1, as in an engine
    exact_inputs: bool = False  # inputs are not quantized
    drop: float = 0.0  # probability of each input element not to be quantized (QDrop, Wei et al., ICLR 2022)
    generator: torch.Generator | None = None  # draws the elements that are not quantized


class _LearnedScale(torch.autograd.Function):
    """Fake quantization of x with the scale of `grid` times `factor` (), with LSQ's gradients for both.

    Esser et al., ICLR 2020, eq. 3 and 5.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, grid: QParams) -> Tensor:
        scale = fp16_scale(grid.scale * factor)
        zero = 0 if grid.zero_point is None else grid.zero_point
        ctx.save_for_backward(x, scale)
        ctx.grid, ctx.low, ctx.high = grid, grid.low - zero, grid.high - zero
        return (x / scale).round_().clamp_(ctx.low, ctx.high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        x, scale = ctx.saved_tensors
        exact = x / scale
        inside = (exact >= ctx.low) & (exact <= ctx.high)
        of_scale = exact.round().clamp_(ctx.low, ctx.high).sub_(exact * inside)
        share = 1 / math.sqrt(x.numel() * ctx.grid.high)  # LSQ, section 2.2: a scale changes as fast as the weights
        return gradient * inside, (gradient * of_scale).sum() * ctx.grid.scale * share, None


class LearnedInput(nn.Module):
    """The quantizer of a layer input. All readers of a tensor share one, so that an engine quantizes it once."""

    def __init__(self, grid: Grid, mode: Mode) -> None:
        super().__init__()
        self.start, self.mode = grid, mode
        self.scale_factor = nn.Parameter(torch.ones(()), requires_grad=False)

    @property
    def learnable(self) -> bool:
        """Whether the grid has one scale for the whole tensor."""
        return isinstance(self.start, QParams) and self.start.axis is None

    @property
    def grid(self) -> Grid:
        """The grid with the scale learned so far."""
        if not isinstance(self.start, QParams):
            return self.start
        return replace(self.start, scale=fp16_scale(self.start.scale * self.scale_factor.detach()))

    def forward(self, x: Tensor) -> Tensor:
        """The fake-quantized tensor, in the shape of `x`; `x` itself while the mode says exact inputs."""
        if self.mode.soft and self.mode.exact_inputs:
            return x
        if self.scale_factor.requires_grad and torch.is_grad_enabled():
            rounded = _LearnedScale.apply(x, self.scale_factor, self.start)
        else:
            rounded = straight_through(x, self.grid)
        if not (self.mode.soft and self.mode.drop):
            return rounded
        drawn = torch.rand(x.shape, generator=self.mode.generator, device="cpu").to(x.device)
        return torch.where(drawn < self.mode.drop, x, rounded)


class LearnedLayer(nn.Module):
    """A Linear or Conv2d with all of `QUANTITIES`. At first it computes `layer` rounded to nearest on the grid `params`.

    `reads`: the quantizer of its input. `nearest`: weights are rounded to nearest in every forward pass, alpha is not
    used. `unit`: what an offset of 1 adds to the output; if it is the standard deviation of the output, offsets and
    factors can have the same learning rate.
    """

    def __init__(
        self, layer: nn.Module, params: QParams, reads: LearnedInput, mode: Mode, nearest: bool = False, unit: float = 1.0
    ) -> None:  # fmt: skip
        super().__init__()
        weight = layer.get_parameter("weight").detach()
        self.layer, self.reads, self.params, self.mode = layer, reads, params, mode
        self.nearest, self.unit = nearest, unit
        ones, bias = torch.ones(len(weight)), getattr(layer, "bias", None)
        self.bias = torch.zeros(len(weight)) if bias is None else bias.detach()
        exact = weight / self._along(params.scale)
        self.alpha = nn.Parameter(alpha_of(exact - exact.floor()))
        self.scale_factor, self.quant_factor, self.dequant_factor = (nn.Parameter(ones.clone()) for _ in range(3))
        self.offset = nn.Parameter(torch.zeros(len(weight)))
        self.learn(())

    def _along(self, channels: Tensor) -> Tensor:
        return channels.reshape(-1, *[1] * (self.layer.get_parameter("weight").ndim - 1))

    def quantities(self) -> dict[str, nn.Parameter]:
        """The parameters that can be learned, by their names in `QUANTITIES`."""
        own = {
            ROUNDING: self.alpha, SCALE: self.scale_factor, QUANT_SCALE: self.quant_factor,
            DEQUANT_SCALE: self.dequant_factor, OFFSET: self.offset,
        }  # fmt: skip
        return own | ({INPUT_SCALE: self.reads.scale_factor} if self.reads.learnable else {})

    def learn(self, names: tuple[str, ...]) -> None:
        """Give the quantities called `names` gradients, and no others."""
        for name, parameter in self.quantities().items():
            parameter.requires_grad_(name in names)

    @torch.no_grad()
    def keep_positive(self) -> None:
        """Clamp the factors of scales that an optimizer step has made too small or negative."""
        for name, parameter in self.quantities().items():
            if name not in (ROUNDING, OFFSET):
                parameter.clamp_(min=SMALLEST_FACTOR)

    def h(self) -> Tensor:
        """h (eq. 8) in the shape of the weight; every value is 0 or 1 unless the mode is soft."""
        return soft_rounding(self.alpha) if self.mode.soft else hard_rounding(self.alpha)

    def integers(self) -> Tensor:
        """The integers of the weight, as floats in its shape; in soft mode values between two integers."""
        scale = self.params.scale * self.scale_factor * self.quant_factor
        exact = self.layer.get_parameter("weight").detach() / self._along(scale)
        if self.nearest:
            rounded = exact + (exact.round() - exact).detach()
        else:
            rounded = exact + (exact.floor() - exact).detach() + self.h()
        return rounded.clamp(-self.params.high, self.params.high)

    def gain(self) -> Tensor:
        """xi (out,): the dequantizing scale relative to its initial value."""
        return self.scale_factor * self.dequant_factor

    def forward(self, x: Tensor) -> Tensor:
        """The output of the quantized layer for `x`, in the shape of the layer's output."""
        exact = self.params.scale * self.gain()
        scale = exact + (fp16_scale(exact) - exact).detach()
        weight, bias = self.integers() * self._along(scale), self.bias + self.offset * self.unit
        x, layer = self.reads(x), self.layer
        if isinstance(layer, nn.Conv2d):
            return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        return F.linear(x, weight, bias)

    @torch.no_grad()
    def rounded(self) -> RoundedLayer:
        """The learned layer as integers with scales xi s' and biases b + eta. Raises ValueError in soft mode."""
        if self.mode.soft:
            raise ValueError("a layer in soft mode has no integers yet: expected mode.soft = False")
        shape = weight_matrix(self.layer).shape
        integers = self.integers().reshape(shape).to(torch.int8)
        found = RoundedLayer(integers, self.params, self.bias.reshape(shape[:2]))
        return with_gain_and_offset(found, self.gain().reshape(shape[:2]), (self.offset * self.unit).reshape(shape[:2]))
