"""From running sums to a branch: one function per form, `FORMS[name](groups, layout, rank)`.

Every form is the least-squares answer within its own kind; `dense` is QwT's (eq. 6, for maps its grouped convolution).
"""

from collections.abc import Callable, Sequence

import torch

from calib.moments import Moments
from compensation.branch import BlockBranch, ConvBranch, DenseBranch, DiagonalBranch, LowRankBranch
from compensation.layout import Layout


class NoFitError(ValueError):
    """This form cannot serve this block; the text says why."""


def dense_branch(groups: Sequence[Moments], layout: Layout, rank: int) -> BlockBranch:  # noqa: ARG001 - the signature of all
    """A full matrix, or for maps one per group."""
    fits = [group.solve() for group in groups]
    return DenseBranch(fits[0]) if layout.channels_last else ConvBranch(fits, layout.stride)


def diagonal_branch(groups: Sequence[Moments], layout: Layout, rank: int) -> BlockBranch:  # noqa: ARG001
    """A scale and a bias per channel: as many regressions with one input each."""
    if layout.d_in != layout.d_out or layout.stride != 1:
        raise NoFitError("a diagonal branch needs a block that keeps its shape")
    scales, biases = [], []
    for group in groups:
        mean_x, mean_r = group.a[-1, :-1] / group.count, group.b[-1] / group.count
        variance = group.a.diagonal()[:-1] / group.count - mean_x.square()
        covariance = group.b[:-1].diagonal() / group.count - mean_x * mean_r
        varies = variance > 1e-12 * (variance + group.shift.square())
        scale = torch.where(varies, covariance / variance, 0.0)
        scales.append(scale)
        biases.append(mean_r - scale * (group.shift + mean_x))
    return DiagonalBranch(scales, biases, layout.channels_last)


def low_rank_branch(groups: Sequence[Moments], layout: Layout, rank: int) -> BlockBranch:
    """Reduced-rank regression: of all maps of `rank`, the one whose output is nearest r.

    With C the covariance of x and W the full fit, its output has the covariance W C W^T; keeping the leading eigenvectors V
    of that, W V V^T loses least (Izenman 1975). Truncating W itself would keep what is large in W, whether x uses it or not.
    """
    if not layout.channels_last:
        raise NoFitError("a low-rank branch works on tokens, not on maps")
    (moments,) = groups
    full = moments.solve()
    centred = moments.about(moments.shift + moments.a[-1, :-1] / moments.count)
    leading = torch.linalg.eigh(full.weight @ centred.a[:-1, :-1] @ full.weight.t()).eigenvectors[:, -rank:]
    mean_r = moments.b[-1] / moments.count
    down, up = full.weight.t() @ leading, leading.t()
    return LowRankBranch(down, up, mean_r - (centred.shift @ down) @ up)


FORMS: dict[str, Callable[[Sequence[Moments], Layout, int], BlockBranch]] = {
    "dense": dense_branch,
    "diagonal": diagonal_branch,
    "low_rank": low_rank_branch,
}
