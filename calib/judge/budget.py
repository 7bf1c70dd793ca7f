"""Changes that make an engine faster at a price: as many of them as lose at most a stated SQNR together.

What each of them costs is known to first order and adds up; then the network is measured, on images that choose, and the
last ones are taken back while it loses more. Images that judge decide whether any stays at all.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from calib.images.batches import ROTATIONS, Half
from calib.judge.held_out import Candidate, Errors, add_errors
from calib.quant_model import QuantModel

CHOOSES, JUDGES = 0, 1  # roles of the parts in a rotation


def loss_db(errors: Errors) -> float:
    """Return how much lower the SQNR (dB) of the second network is than that of the first."""
    return errors.db(0) - errors.db(1)


class Spent(NamedTuple):
    """`candidate`, what it loses on the images that judge, and whether that is within the budget."""

    candidate: Candidate
    errors: Errors
    within: bool


@dataclass(frozen=True)
class Budget:
    """The network without the changes, and how to make it with them.

    `candidate(by_rotation, names)`: the network with the changes `names`, in the trials of rotation r with `by_rotation[r]`.
    """

    model: QuantModel
    halves: Sequence[Half]
    candidate: Callable[[Sequence[Sequence[str]], Sequence[str]], Candidate]
    max_loss_db: float

    def errors(self, candidate: Candidate, role: int, rotations: Sequence[int]) -> Errors:
        """Return the errors without changes and of `candidate`, on the parts that have this role in `rotations`."""
        plain, errors = Candidate.unfitted("", self.model), Errors(2)
        for rotation in rotations:
            add_errors(errors, [plain, candidate], rotation, ROTATIONS[rotation][role], self.halves)
        return errors

    def affordable(self, order: Sequence[str], cost: Mapping[str, float], rotations: Sequence[int]) -> list[str]:
        """Return the first changes of `order` that lose at most `max_loss_db` together, on the images that choose.

        `cost`: the squared error of the network's output by each change, to first order.
        """

        def measured(names: Sequence[str]) -> Errors:
            return self.errors(self.candidate([names] * len(ROTATIONS), names), CHOOSES, rotations)

        limit = measured([]).noise[0] * (10 ** (self.max_loss_db / 10) - 1)
        spent = itertools.accumulate(cost[name] for name in order)
        names = [name for name, total in zip(order, spent, strict=True) if total <= limit]
        while names and loss_db(measured(names)) > self.max_loss_db:
            names = names[:-1]
        return names

    def judged(self, by_rotation: Sequence[Sequence[str]], names: Sequence[str]) -> Spent:
        """Return what the changes `names`, chosen by either rotation as `by_rotation`, lose on the images that judge."""
        candidate = self.candidate(by_rotation, names)
        errors = self.errors(candidate, JUDGES, range(len(ROTATIONS)))
        return Spent(candidate, errors, bool(names) and loss_db(errors) <= self.max_loss_db)
