"""The limits that a package has to keep to be accepted: MAX_DROP= of accuracy and MIN_SPEEDUP=.

MAX_DROP=1%    top-1 accuracy on the labels falls by at most one percentage point; without labels at most 1 % of the images
               get another top-1 result than from the float network. Of a detector: average precision, on annotations or
               beside the float network's boxes (overlap .5)
MAX_DROP=30dB  the error of the outputs lies at least 30 dB below them (SQNR); of pictures: PSNR to the float network's
MIN_SPEEDUP=1.5  at least 1.5 times as fast as the float network, with 95 % confidence

They are checked on the evaluation images, which chose nothing: on what the engine computed where it was run, else on its
graph in ONNX Runtime.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calib.errors import TooFewError, UserError
from calib.task import BOXES, TOKENS, Task
from deploy.engine.backends import ONNXRUNTIME
from deploy.measure.accuracy import Fidelity, fidelity
from deploy.measure.latency import Comparison
from deploy.measure.tasks import task_module
from deploy.measure.top1 import points

if TYPE_CHECKING:
    from torch import Tensor

STANDARD_ERRORS = 2 * 1.96  # in a 95 % interval
DROP = r"(\d+(?:\.\d+)?) ?(%|dB)"


def _decibels(found: Fidelity) -> tuple[str, float]:
    """What a limit in dB is about: PSNR of pictures, else SQNR."""
    return ("SQNR", found.sqnr_db) if found.psnr_db is None else ("PSNR", found.psnr_db)


@dataclass(frozen=True)
class MaxDrop:
    """How much accuracy may be lost: `amount` percentage points, or down to `amount` dB."""

    amount: float
    unit: str  # % | dB

    @classmethod
    def from_text(cls, text: str) -> "MaxDrop":
        """Read "1%" or "30dB". Raises UserError for anything else."""
        found = re.fullmatch(DROP, text.strip(), re.IGNORECASE)
        if not found:
            raise UserError(
                f"MAX_DROP='{text}': expected 1% (of top-1 results or average precision) or 30dB (SQNR, of pictures PSNR)"
            )
        if found[2] == "%" and float(found[1]) >= 100:
            raise UserError(f"MAX_DROP='{text}': expected a percentage below 100, such as 1%")
        return cls(float(found[1]), "%" if found[2] == "%" else "dB")

    def __str__(self) -> str:
        """As it was given."""
        return f"{self.amount:g}{self.unit}"

    def require_measurable(self, task: str) -> None:
        """Raise UserError for percent of outputs of a `task` in which nothing is counted."""
        if self.unit == "%" and task_module(task).points_lost is None:
            raise UserError(
                f"MAX_DROP={self}: the outputs of this network are neither classes nor features nor boxes, so nothing is "
                f"counted; expected decibels, such as MAX_DROP=30dB"
            )

    def require_images(self, count: int, task: str, given: bool) -> None:
        """Raise UserError if one of `count` evaluation images alone is more than what may be lost.

        `given`: they come from EVAL=. Average precision and tokens do not move by images.
        """
        if self.unit == "%" and task not in (BOXES, TOKENS) and 0 < count * self.amount < 100:
            more = "in EVAL=" if given else "in EVAL=, or in CALIB= beside the CALIB_IMAGES= that calibrate"
            raise UserError(
                f"MAX_DROP={self}: one of {count} evaluation images{'' if given else ' held out of CALIB='} is "
                f"{100 / count:.3g} %, so they cannot show it: expected {math.ceil(100 / self.amount)} or more {more}"
            )

    def measured(self, found: Fidelity, task: str) -> tuple[bool, str]:
        """Whether `found`, of outputs of this `task`, keeps this limit, and in words what was measured."""
        on = f"on {found.count} images"
        if self.unit == "dB":
            name, value = _decibels(found)
            return value >= self.amount, f"{name} {value:.1f} dB {on}, expected {self.amount:g} or more"
        lost, words = task_module(task).points_lost(found)
        return lost <= self.amount, f"{words} {on}, expected at most {self.amount:g}"


@dataclass(frozen=True)
class Limits:
    """What was asked for; None: not asked for."""

    max_drop: MaxDrop | None = None
    min_speedup: float | None = None

    def on_accuracy(self) -> str:
        """The limit on accuracy as it was given, empty without one."""
        return "" if self.max_drop is None else f"MAX_DROP={self.max_drop}"

    def require_timed(self, backend: str) -> None:
        """Raise UserError for a speed that `make engine` does not measure with this backend."""
        if self.min_speedup is not None and backend != ONNXRUNTIME:
            raise UserError(
                f"MIN_SPEEDUP={self.min_speedup:g}: make engine times engines of TARGET=onnxruntime alone, not of "
                f"{backend}; leave it out, and time an engine on its GPU with python -m benchmarks.gpu_latency"
            )

    def check(self, found: Fidelity, task: str, speed: Comparison) -> "Acceptance":
        """What came of the limits; `task`: the name of what the outputs are."""
        checks = []
        if self.max_drop is not None:
            checks.append(Check(self.on_accuracy(), *self.max_drop.measured(found, task)))
        if self.min_speedup is not None:
            measured = f"{speed.ratio:.2f}x the float network (95 %: {speed.low:.2f} to {speed.high:.2f})"
            expected = f"expected the whole interval at {self.min_speedup:g} or above"
            checks.append(
                Check(f"MIN_SPEEDUP={self.min_speedup:g}", speed.low >= self.min_speedup, f"{measured}, {expected}")
            )
        return Acceptance(tuple(checks))


@dataclass(frozen=True)
class Check:
    """One limit: as it was given, whether it is kept, and what was measured in words."""

    limit: str
    kept: bool
    measured: str

    def line(self) -> str:
        """PASS or FAIL, with the figures."""
        return f"{'PASS' if self.kept else 'FAIL'} {self.limit}: {self.measured}"


@dataclass(frozen=True)
class Acceptance:
    """What came of all limits that were given; without any, the package is accepted."""

    checks: tuple[Check, ...] = ()

    @property
    def accepted(self) -> bool:
        """Whether every limit is kept."""
        return all(check.kept for check in self.checks)

    def lines(self) -> list[str]:
        """One line for each limit."""
        return [check.line() for check in self.checks]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for report and manifest."""
        return {
            "accepted": self.accepted,
            "checks": [{"limit": each.limit, "kept": each.kept, "measured": each.measured} for each in self.checks],
        }


def keeps(
    limit: MaxDrop, task: Task, exact: "Mapping[str, Tensor]", found: "Mapping[str, Tensor]", sources: Sequence[int]
) -> bool:
    """Whether the outputs `found` (N, ...) of a network keep `limit` beside those of the float network, `exact`.

    They have to keep it by one standard error over source images, whose numbers are `sources` (N,), because other images
    will decide. Raises TooFewError where so few images or boxes cannot show a share as small as the limit.
    """
    one, other = ({name: value.cpu().numpy() for name, value in each.items()} for each in (exact, found))
    measured = fidelity(one, other, task, None, sources)
    if limit.unit == "dB":
        low, high = measured.sqnr_interval_db or (math.nan, math.nan)
        return _decibels(measured)[1] - (high - low) / STANDARD_ERRORS >= limit.amount
    shown, what = (measured.count, "images") if measured.boxes is None else (measured.boxes, "boxes")
    wanted = math.ceil(100 / limit.amount) if limit.amount else 1
    if shown < wanted:
        raise TooFewError(f"{shown} {what} that calibration can spare cannot show it, {wanted} could")
    lost = task_module(task.name).points_lost(measured)[0] / 100
    return points(lost + math.sqrt(max(0.0, lost * (1 - lost)) / len(set(sources)))) <= limit.amount
