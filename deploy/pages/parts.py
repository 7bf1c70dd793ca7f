"""What page and card are put together from: lines of text and figures, and tables of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from deploy.pages.values import Figure

Part = str | Figure
Line = tuple[Part, ...]
Row = tuple[str, Line]  # what it is, what is said of it


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head; the first cell of a row names it."""

    head: tuple[str, ...]
    rows: tuple[tuple[Line, ...], ...]


def listed(names: Sequence[str], most: int = 24) -> str:
    """Names with commas between them, and how many more there are than `most`."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
