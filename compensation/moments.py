"""Linear regression from running sums: r ~ W x + b without keeping a single sample.

With x~ = [x - shift, 1] the sums

    A = sum x~ x~^T  (d+1, d+1)      B = sum x~ r^T  (d+1, d_out)      q = sum r^2  (d_out,)      N = A[d, d]

hold everything least squares needs (QwT eq. 6, ERQ eq. 8): A z = B gives z = [W^T; b + W shift], and the squared error
of *any* W, b is the quadratic form q - 2 <z, B> + <z, A z>. All in float64. The shift, the mean of the first samples seen,
keeps a channel with a large mean from drowning the others: in float32 without it, R2 of a well-posed problem comes out
as -134.
"""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

RIDGES = (0.0, 1e-8, 1e-6, 1e-4)  # tried in turn, on a matrix with a diagonal of ones
LARGEST_WEIGHT = 1e3  # beyond it FP16 products overflow, and the weights are noise that cancels
SINGULAR = 1e-12  # a pivot below this is rounding error: the factorisation went through by luck
CONSTANT = 1e-24  # a channel whose variance is less than this share of its mean square does not vary


class Fit(NamedTuple):
    """r ~ weight x + bias; `weight` (d_out, d_in), `bias` (d_out,), float64. `ridge`: the one of `RIDGES` it took."""

    weight: Tensor
    bias: Tensor
    ridge: float = 0.0


def _cholesky_solution(matrix: Tensor, right: Tensor, constant: Tensor, least: float) -> tuple[Tensor, float]:
    """(z, ridge >= least) with (D A D + ridge I') (z / D) = D B, D = diag(A)^-1/2; I' leaves the bias out.

    `constant` (d+1,): columns that get z = 0.
    """
    scale = torch.where(constant, 0.0, matrix.diagonal().rsqrt())
    scaled = matrix * scale[:, None] * scale
    scaled.diagonal()[constant] = 1.0
    for ridge in (least, *(ridge for ridge in RIDGES if ridge > least)):
        penalty = torch.full_like(scale, ridge)
        penalty[-1] = 0.0
        factor, failed = torch.linalg.cholesky_ex(scaled + penalty.diag())
        if failed or factor.diagonal().square().min() < SINGULAR:
            continue
        solution = scale[:, None] * torch.cholesky_solve(scale[:, None] * right, factor)
        if not solution[:-1].numel() or float(solution[:-1].abs().max()) < LARGEST_WEIGHT:
            return solution, ridge
    raise torch.linalg.LinAlgError(
        f"no fit with weights below {LARGEST_WEIGHT:.0f} from {float(matrix[-1, -1]):.0f} samples of {len(matrix) - 1} "
        f"channels, even with ridge {ridge:g}: use more samples or fewer channels"
    )


class Moments:
    """Running sums of pairs x (d_in,), r (d_out,)."""

    def __init__(self, d_in: int, d_out: int) -> None:
        self.shift = torch.zeros(d_in, dtype=torch.float64)
        self.a = torch.zeros(d_in + 1, d_in + 1, dtype=torch.float64)
        self.b = torch.zeros(d_in + 1, d_out, dtype=torch.float64)
        self.q = torch.zeros(d_out, dtype=torch.float64)

    @property
    def count(self) -> float:
        """Samples seen."""
        return float(self.a[-1, -1])

    def update(self, x: Tensor, r: Tensor) -> None:
        """Add the samples `x` (T, d_in), `r` (T, d_out), of any float dtype and device."""
        x, r = x.to(self.a), r.to(self.a)
        if not self.count and len(x):
            self.shift = x.mean(0)
        x = torch.cat((x - self.shift, x.new_ones(len(x), 1)), 1)
        self.a += x.t() @ x
        self.b += x.t() @ r
        self.q += r.square().sum(0)

    def about(self, shift: Tensor) -> "Moments":
        """The same samples with x measured from `shift` (d_in,)."""
        moved = Moments(len(self.shift), len(self.q))
        step = torch.eye(len(self.a), dtype=torch.float64)
        step[:-1, -1] = self.shift - shift
        moved.shift, moved.a, moved.b, moved.q = shift, step @ self.a @ step.t(), step @ self.b, self.q
        return moved

    def merge(self, other: "Moments") -> "Moments":
        """The samples of both, exactly; neither is changed."""
        merged = self.about(self.shift if self.count else other.shift)
        other = other.about(merged.shift)
        merged.a, merged.b, merged.q = merged.a + other.a, merged.b + other.b, merged.q + other.q
        return merged

    def solve(self, ridge: float = 0.0) -> Fit:
        """Return argmin mean |r - W x - b|^2 + `ridge` |W D|^2, D the root mean square of each (shifted) channel.

        A numerically singular problem gets the least of `RIDGES` above `ridge` that gives weights below `LARGEST_WEIGHT`.
        Channels that do not vary get weight 0. Raises torch.linalg.LinAlgError if no ridge helps, ValueError without
        samples.
        """
        if not self.count:
            raise ValueError("no samples to fit: call update first")
        diagonal = self.a.diagonal()[:-1]
        power = diagonal + self.count * self.shift.square()
        constant = torch.cat((diagonal <= CONSTANT * power, torch.tensor([False])))
        z, ridge = _cholesky_solution(self.a, self.b, constant, ridge)
        weight = z[:-1].t()
        return Fit(weight, z[-1] - weight @ self.shift, ridge)

    def sse(self, weight: Tensor, bias: Tensor) -> float:
        """sum |r - W x - b|^2 over the samples, for any `weight` (d_out, d_in) and `bias` (d_out,)."""
        weight, bias = weight.to(self.a), bias.to(self.a)
        z = torch.cat((weight.t(), (bias + weight @ self.shift)[None]))
        return float(self.q.sum() - 2 * (z * self.b).sum() + (z * (self.a @ z)).sum())

    def total(self) -> float:
        """sum |r - mean r|^2 over the samples."""
        return float((self.q - self.b[-1].square() / self.count).sum())


def pooled(parts: Sequence[Moments]) -> Moments:
    """Return the sums of the samples of all `parts`."""
    return reduce(Moments.merge, parts)


def r2(groups: Sequence[Moments], fits: Sequence[Fit]) -> float:
    """1 - error / variance, the share of r that the fit of each of `groups` of channels explains; 0 if r does not vary."""
    error = sum(group.sse(fit.weight, fit.bias) for group, fit in zip(groups, fits, strict=True))
    return _r2(error, sum(group.total() for group in groups))


def _r2(error: float, total: float) -> float:
    return 1 - error / total if total > 0 else 0.0
