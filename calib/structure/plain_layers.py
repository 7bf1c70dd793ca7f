"""Convolutions and linear layers as the plain Linear or Conv2d with the same output, from their weights and arguments.

    Conv1d                                    a Conv2d over maps that are one wide
    ConvTranspose2d with a stride of 1        a Conv2d with the kernel turned by 180 degrees, padded by d (k - 1) - p
    padding by hand, or "same"                a Conv2d with that padding; behind a padding of its own where the sides differ
                                              or the border is not of zeros

A transposed convolution with a larger stride stays: as a convolution to s^2 times the channels and a shuffle of pixels it
would run in INT8 and move more bytes than FP16 does, because the shuffle is a kernel of its own.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

from calib.structure.trace import CONV1D, aten

Pads = Sequence[int]  # (left, right, top, bottom)
BORDERS = {  # by the mode of torch's `pad`
    "constant": nn.ZeroPad2d, "reflect": nn.ReflectionPad2d, "replicate": nn.ReplicationPad2d, "circular": nn.CircularPad2d,
}  # fmt: skip


class SequenceConv(nn.Module):
    """A Conv1d as a convolution of maps that are one wide."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, N) -> (B, out, N')."""
        return self.conv(x.unsqueeze(3)).squeeze(3)


def _pair(value: object, beside: int | None = None) -> tuple[int, int]:
    """Return `value` for both axes; that of one axis goes with `beside` for the other."""
    given = [int(each) for each in value] if isinstance(value, list | tuple) else [int(value)]  # type: ignore[call-overload]
    if len(given) == 2:
        return given[0], given[1]
    return given[0], given[0] if beside is None else beside


def _same(size: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Return the pads of torch's padding 'same'."""
    total = [step * (length - 1) for length, step in zip(size, dilation, strict=True)]
    (top, bottom), (left, right) = ((each // 2, each - each // 2) for each in total)
    return [left, right, top, bottom]


def _conv(
    weight: Tensor, bias: Tensor | None, stride: Pads, padding: Pads, dilation: Pads, groups: int, pads: Pads, mode: str
) -> nn.Module:
    """Return a Conv2d of these values, behind a padding by `pads`."""
    (left, right, top, bottom), (height, width) = pads, padding
    if mode == "constant" and left == right and top == bottom and (not any(pads) or not (height or width)):
        height, width, pads = height + top, width + left, (0, 0, 0, 0)
    conv = nn.Conv2d(
        weight.shape[1] * groups, len(weight), _pair(weight.shape[2:]), _pair(stride), (height, width), _pair(dilation),
        groups, bias is not None,
    )  # fmt: skip
    conv.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return nn.Sequential(BORDERS[mode]((left, right, top, bottom)), conv) if any(pads) else conv


def plain_conv(weight: Tensor, bias: Tensor | None, node: fx.Node, pads: Pads, mode: str = "constant") -> nn.Module:
    """Return a Conv2d like the call `node` of a Conv1d or Conv2d, whose input is padded by `pads` first, as `mode` says."""
    args: Any = [*node.args[3:], *[None] * 4][:4]
    sequence = node.target in CONV1D
    if sequence:
        weight = weight.unsqueeze(3)
    one, none = (1, 0) if sequence else (None, None)
    stride, dilation, padding = _pair(args[0] or 1, one), _pair(args[2] or 1, one), args[1] or 0
    if isinstance(padding, str):
        pads, padding = (_same(weight.shape[2:], dilation) if padding == "same" else pads), 0
    conv = _conv(weight, bias, stride, _pair(padding, none), dilation, int(args[3] or 1), pads, mode)
    return SequenceConv(conv) if sequence else conv


def is_turned(node: fx.Node) -> bool:
    """Whether the call `node` is a transposed convolution that is a convolution with the kernel turned."""
    if node.target is not aten.conv_transpose2d.input:
        return False
    weight, (stride, padding, beyond, _, dilation) = node.args[1].meta["val"], _transposed(node)  # type: ignore[union-attr]
    reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    return stride == (1, 1) and beyond == (0, 0) and all(r >= p for r, p in zip(reach, padding, strict=True))


def _transposed(node: fx.Node) -> Any:
    """Return (stride, padding, output padding, groups, dilation) of a call of a transposed convolution of maps."""
    args: Any = [*node.args[3:], *[None] * 5][:5]
    return _pair(args[0] or 1), _pair(args[1] or 0), _pair(args[2] or 0), int(args[3] or 1), _pair(args[4] or 1)


def turned_conv(weight: Tensor, bias: Tensor | None, node: fx.Node) -> nn.Module:
    """Return a Conv2d like the call `node` of a transposed convolution, for which `is_turned` holds."""
    stride, padding, _, groups, dilation = _transposed(node)
    inputs, outputs, *size = weight.shape
    by_group = weight.flip(2, 3).reshape(groups, inputs // groups, outputs, *size).transpose(1, 2)
    turned = by_group.reshape(groups * outputs, inputs // groups, *size)
    pads = [d * (k - 1) - p for d, k, p in zip(dilation, size, padding, strict=True)]
    return _conv(turned, bias, stride, pads, dilation, groups, (0, 0, 0, 0), "constant")


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a Linear of these values."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return linear
