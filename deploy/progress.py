"""Progress on the terminal: a line for each stage when it ends, and a bar for long stages until then."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import rich.progress
from rich.console import Console

Item = TypeVar("Item")

QUIET = 60.0  # seconds between lines if there is no terminal for a bar


class Progress:
    """Prints stages to stderr and records their durations: stage -> `seconds`."""

    def __init__(self, title: str) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.seconds: dict[str, float] = {}
        self.name = ""
        self.on_terminal = sys.stderr.isatty()
        self.bars = rich.progress.Progress(console=self.console, transient=True, disable=not self.on_terminal)
        self.console.print(title, style="bold", markup=False)

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[..., None]]:
        """Time a stage. The function yielded takes the lines that describe its result."""
        lines: list[str] = []
        self.name = name
        start = time.perf_counter()
        with self.bars:
            yield lambda *notes: lines.extend(notes)
        self.seconds[name] = round(time.perf_counter() - start, 3)
        first, *rest = lines or [""]
        self.console.print(f"  {name:<10}{self.seconds[name]:7.1f} s  {first}", markup=False)
        for line in rest:
            self.console.print(f"{'':23}{line}", markup=False)

    def bar(self, items: Iterable[Item], total: int) -> Iterator[Item]:
        """Yield `items`, with a bar on a terminal until the last one."""
        with self._task() as show:
            for done, item in enumerate(items, 1):
                yield item
                show(done, total)

    @contextmanager
    def steps(self) -> Iterator[Callable[[int, int], None]]:
        """Yield a function to call with (steps done, total): it shows a bar on a terminal, else a line every minute."""
        with self._task() as show:
            yield show if self.on_terminal else self._now_and_then()

    @contextmanager
    def _task(self) -> Iterator[Callable[[int, int], None]]:
        """A bar that appears with the first step."""
        task = self.bars.add_task(f"  {self.name}", visible=False)
        try:
            yield lambda done, total: self.bars.update(task, completed=done, total=total, visible=True)
        finally:
            self.bars.remove_task(task)

    def _now_and_then(self) -> Callable[[int, int], None]:
        begun: tuple[float, int] | None = None  # time and step of the first call: a run may continue from a checkpoint
        said = time.monotonic()

        def at(done: int, total: int) -> None:
            nonlocal begun, said
            now = time.monotonic()
            begun = begun or (now, done)
            if now - said < QUIET or done == begun[1]:
                return
            said = now
            left = (now - begun[0]) / (done - begun[1]) * (total - done)
            self.console.print(f"  {self.name:<10} step {done} of {total}, {left / 60:.0f} min left", markup=False)

        return at
