"""The proof of every step that must not change the function of a network: run it before and after, and compare.

The runs are in float64, where the same function in another order of operations differs by less than 1e-10: a network with
random weights can amplify float32's rounding to more than a wrong scale would cause in another.
"""

import copy
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from calib.errors import of_types, several_types
from calib.structure.moves import Place, move

MAX_REL_L2 = 1e-4  # a wrong scale changes percents, a float32 run about 1e-6
Step = TypeVar("Step")


def output_of(net: nn.Module, example: Tensor, edit: Callable[[nn.Module], None] | None = None) -> Tensor:
    """Return the output of a copy of `net`, edited, on `example`; all of it flattened, from a run in float64.

    Where the network's own code insists on another type, the run is in float32.
    """
    for kind in (torch.float64, torch.float32):
        changed = copy.deepcopy(net).to(kind)
        if edit:
            edit(changed)
        try:
            with torch.no_grad():
                output = changed(example.to(kind))
        except (RuntimeError, TypeError):
            if kind is torch.float32:
                raise
            continue
        break
    parts, _ = tree_flatten(output)
    return torch.cat([part.double().flatten() for part in parts if isinstance(part, Tensor)])


def difference(exact: Tensor, other: Tensor) -> float:
    """Return the relative L2 difference of two outputs; infinite where one of them is not a number."""
    if other.shape != exact.shape:
        return float("inf")
    apart, norm = float((other - exact).norm()), float(exact.norm())
    if apart != apart:
        return float("inf")
    return apart / norm if norm else apart


def preserving(
    net: nn.Module, steps: Sequence[Step], apply: Callable[[nn.Module, Sequence[Step]], None], example: Tensor
) -> tuple[tuple[Step, ...], tuple[tuple[Step, float], ...]]:
    """Return (the steps that leave the output of `net` as it is, those that do not with the difference that each makes).

    `apply` makes some steps together on a copy of `net`, which may be in float64. Steps that are sound alone have to be
    sound together as well; otherwise all of them are refused. Where the network's code fails with a step, the difference is
    infinite. Raises UserError if the network itself fails because it computes in several types.
    """
    if not steps:
        return (), ()
    try:
        exact = output_of(net, example)
    except RuntimeError as error:
        if not of_types(error):
            raise
        raise several_types(type(net).__name__, error) from error

    def apart_by(some: Sequence[Step]) -> float:
        try:
            return difference(exact, output_of(net, example, lambda copied: apply(copied, some)))
        except Exception:  # the network's own code may raise anything
            return float("inf")

    if apart_by(steps) <= MAX_REL_L2:
        return tuple(steps), ()
    alone = [(step, apart_by([step])) for step in steps]
    sound = [step for step, apart in alone if apart <= MAX_REL_L2]
    refused = [(step, apart) for step, apart in alone if not apart <= MAX_REL_L2]
    rest = apart_by(sound) if sound else 0.0
    if rest > MAX_REL_L2:
        return (), (*refused, *((step, rest) for step in sound))
    return tuple(sound), tuple(refused)


def move_by_chance(net: nn.Module, places: Sequence[Place]) -> None:
    """Move random scales of 1/2 to 2, and shifts, at `places` (edits `net`)."""
    generator = torch.Generator().manual_seed(0)
    kind = next(net.parameters()).dtype
    for place in places:
        scale = torch.exp2(torch.rand(len(place.rows), generator=generator, dtype=kind) * 2 - 1)
        shift = torch.randn(len(place.rows), generator=generator, dtype=kind) * 0.1 * place.shifts
        move(net, place, scale, shift)
