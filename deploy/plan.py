"""Stages by name: what each reads and writes, and which of them a run from one to another needs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from calib.errors import UserError, suggestion
from deploy.run import GIVEN, Run

TORCH, BRIDGE, ENGINE = "torch", "bridge", "engine"  # the halves of the way


@dataclass(frozen=True)
class Stage:
    """One step of `make engine`. `reads`, `writes`: fields of `Run`; `run` returns lines that tell what came of it."""

    name: str
    half: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    run: Callable[[Run], Sequence[str]]


def require_order(stages: Sequence[Stage]) -> None:
    """Raise ValueError unless an earlier stage has written all that a stage reads."""
    written = {*GIVEN}
    for stage in stages:
        if missing := [name for name in stage.reads if name not in written]:
            raise ValueError(f"stage '{stage.name}' reads '{missing[0]}', which no stage before it writes")
        written |= {*stage.writes}


def _place(stages: Sequence[Stage], name: str, option: str) -> int:
    """Where the stage called `name` stands. Raises UserError with the nearest names."""
    names = [stage.name for stage in stages]
    if name not in names:
        raise UserError(
            f"{option} '{name}': no such stage in this recipe; expected {', '.join(names)}.{suggestion(name, names)}"
        )
    return names.index(name)


def planned(stages: Sequence[Stage], begin: str | None, until: str | None) -> tuple[Stage, ...]:
    """The stages to run: those from `begin` to `until`, and before `begin` those that write what is read later.

    None stands for the first and the last. Raises UserError for a name that is no stage, or an end before the beginning.
    """
    require_order(stages)
    first = 0 if begin is None else _place(stages, begin, "--from")
    last = len(stages) - 1 if until is None else _place(stages, until, "--until")
    if first > last:
        raise UserError(f"--from '{begin}' comes after --until '{until}': expected an earlier stage or the same")
    chosen = list(stages[first : last + 1])
    wanted = {name for stage in chosen for name in stage.reads}
    for stage in reversed(stages[:first]):
        if wanted & {*stage.writes}:
            chosen.insert(0, stage)
            wanted |= {*stage.reads}
    return tuple(chosen)
