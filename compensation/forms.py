"""From running sums to a branch: the forms a branch may take, `FORMS[name]`, each with what it reads and costs.

Every form is the least-squares answer within its own kind; `dense` is QwT's (eq. 6, for maps its grouped convolution),
`shared` and `shared_mlp` read what an INT8 layer of the block reads already.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from calib.quantizer import QParams
from compensation.branch import BlockBranch, ConvBranch, DenseBranch, SharedBranch
from compensation.layout import Layout
from compensation.moments import Moments


class NoFitError(ValueError):
    """This form cannot serve this block; the text says why."""


@dataclass(frozen=True)
class Place:
    """Where a branch goes: how it sees its block, and by form the INT8 layer (and its scale) whose input it may share."""

    layout: Layout
    shared: Mapping[str, tuple[str, QParams]] = field(default_factory=dict)

    def serves(self, form: str) -> bool:
        """Whether a branch of `form` finds here what it reads."""
        return not FORMS[form].shares or form in self.shared

    def source(self, form: str) -> str:
        """The layer whose input a branch of `form` reads; empty for the block's input."""
        return self.shared[form][0] if FORMS[form].shares else ""


def dense_branch(groups: Sequence[Moments], place: Place, ridge: float = 0.0) -> BlockBranch:
    """A full matrix, or for maps one per group."""
    fits = [group.solve(ridge=ridge) for group in groups]
    return DenseBranch(fits[0]) if place.layout.channels_last else ConvBranch(fits, place.layout.stride)


def shared_branch(form: str, groups: Sequence[Moments], place: Place, ridge: float = 0.0) -> BlockBranch:
    """A full matrix in INT8 beside the layer that `form` stands for."""
    return SharedBranch(groups[0].solve(ridge=ridge), *place.shared[form])


@dataclass(frozen=True)
class Form:
    """`fit`: of sums per group, at a place, with a ridge on channels of unit power. `kernels`: what a branch on tokens adds
    to a TensorRT-RTX engine, measured (benchmarks/results/branch_forms.json).

    `map_kernels`: the most that one on maps adds, measured in MobileNet-v2 and ResNet-18: 2 beside nearly every block,
    31 for all 17 and 11 for all 8.
    """

    fit: Callable[[Sequence[Moments], Place, float], BlockBranch]
    kernels: int
    map_kernels: int = 0  # forms that work on tokens alone add none
    shares: bool = False  # reads the integers of a layer of the block, not the block's input

    def kernels_at(self, place: Place) -> int:
        """What a branch adds at `place`."""
        return self.kernels if place.layout.channels_last else self.map_kernels


FORMS = {
    "dense": Form(dense_branch, kernels=1, map_kernels=2),
    "shared": Form(partial(shared_branch, "shared"), kernels=0, shares=True),
    "shared_mlp": Form(partial(shared_branch, "shared_mlp"), kernels=0, shares=True),
}
