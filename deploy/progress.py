"""What a person sees while the stages run: one line per stage when it ends, a bar inside the long ones."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")


class Progress:
    """Prints stages to stderr and keeps their durations in `seconds`, by stage."""

    def __init__(self, title: str) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.seconds: dict[str, float] = {}
        self.name = ""
        self.console.print(title, style="bold", markup=False)

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[..., None]]:
        """Time a stage; the function yielded takes the lines that say what came of it."""
        lines: list[str] = []
        self.name = name
        start = time.perf_counter()
        yield lambda *notes: lines.extend(notes)
        self.seconds[name] = round(time.perf_counter() - start, 3)
        first, *rest = lines or [""]
        self.console.print(f"  {name:<10}{self.seconds[name]:7.1f} s  {first}", markup=False)
        for line in rest:
            self.console.print(f"{'':23}{line}", markup=False)

    def bar(self, items: Iterable[Item], total: int) -> Iterator[Item]:
        """`items`, with a bar on a terminal that disappears at the end."""
        if not sys.stderr.isatty():
            yield from items
            return
        yield from track(items, f"  {self.name}", total, console=self.console, transient=True)
