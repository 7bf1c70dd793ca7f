"""How a branch sees a block: which numbers of the block's input meet which numbers of its output.

    tokens    x (B, ..., C_in), y (B, ..., C_out)            every token is a sample, all channels together
    maps      x (B, C_in, H, W), y (B, C_out, H', W')        every position x[:, :, ::s, ::s] is a sample, in G groups of
                                                             channels: C_in/G -> C_out/G each (a grouped 1x1 convolution)

Groups keep the branch of a CNN cheap (QwT: about 64 input channels per group) and make it G independent regressions.
"""

import math
from dataclasses import dataclass

from torch import Size, Tensor

CHANNELS_PER_GROUP = 64


@dataclass(frozen=True)
class Layout:
    """Shape of the regression: `groups` of `d_in` -> `d_out` channels; `stride` between the positions of maps."""

    channels_last: bool
    d_in: int
    d_out: int
    groups: int = 1
    stride: int = 1

    def input_rows(self, x: Tensor) -> tuple[Tensor, ...]:
        """Block input -> one (T, d_in) per group."""
        return self._rows(x if self.channels_last else x[:, :, :: self.stride, :: self.stride])

    def output_rows(self, y: Tensor) -> tuple[Tensor, ...]:
        """Block output -> one (T, d_out) per group."""
        return self._rows(y)

    def _rows(self, x: Tensor) -> tuple[Tensor, ...]:
        rows = x if self.channels_last else x.permute(0, 2, 3, 1)
        return rows.reshape(-1, rows.shape[-1]).chunk(self.groups, 1)


def group_count(c_in: int, c_out: int) -> int:
    """The largest number of groups that divides both channel counts, at most one per `CHANNELS_PER_GROUP` inputs."""
    most, common = max(c_in // CHANNELS_PER_GROUP, 1), math.gcd(c_in, c_out)
    return max(count for count in range(1, most + 1) if common % count == 0)


def layout_from_shapes(block: str, x: Size, y: Size, channels_last: bool) -> Layout:
    """The layout of `block` with input shape `x` and output shape `y`.

    Raises ValueError naming the block if tokens are added or dropped, or positions are not those of a stride.
    """
    if channels_last:
        if x[:-1] != y[:-1]:
            raise ValueError(f"block '{block}' turns tokens {tuple(x)} into {tuple(y)}: a branch needs one for one")
        return Layout(True, x[-1], y[-1])
    stride = round(x[2] / y[2])
    if any(-(-before // max(stride, 1)) != after for before, after in zip(x[2:], y[2:], strict=True)):
        raise ValueError(f"block '{block}' turns a map {tuple(x)} into {tuple(y)}: no stride of a 1x1 convolution does")
    groups = group_count(x[1], y[1])
    return Layout(False, x[1] // groups, y[1] // groups, groups, stride)
