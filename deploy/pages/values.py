"""Checked access to the JSON files of a package, which may be of any origin, and the figures that a page shows of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from calib.errors import UserError
from deploy.package import read_json

LONGEST = 500  # characters of a text that are shown
REPLACED = "\N{REPLACEMENT CHARACTER}"
LARGEST = 1e18  # no figure of ours is larger, and a chart can still draw it

Key = str | int
T = TypeVar("T")


@dataclass(frozen=True)
class Figure:
    """A number as a page shows it: `text`, the `value` behind it, and the `source` of that.

    A source is a file of the package; where a JSON file holds the value itself, with its JSON pointer (RFC 6901):
    "report.json#/fidelity/sqnr_db". `value` is in the units of the source, `text` perhaps in others.
    """

    text: str
    value: float
    source: str

    def __str__(self) -> str:
        return self.text


def clipped(text: str) -> str:
    """`text` on one line, cut where it is too long to be shown, without characters that have no picture or turn others."""
    line = "".join(each if each.isprintable() else REPLACED for each in " ".join(text.split()))
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} [cut]"


class Values:
    """A part of a JSON file. What is asked for has to be there and of the type that the method names, or it is a UserError.

    Keys lead from this part into it; integers are places in lists.
    """

    def __init__(self, file: Path, content: Any, at: tuple[Key, ...] = ()) -> None:
        self.file, self.content, self.path = file, content, at

    @classmethod
    def of(cls, file: Path) -> "Values":
        """All of a JSON file. Raises UserError if it is missing or holds no JSON object."""
        return cls(file, read_json(file))

    def _wrong(self, keys: tuple[Key, ...], expected: str) -> UserError:
        at = ".".join(clipped(str(key)) for key in (*self.path, *keys))
        return UserError(f"'{self.file}' holds no {expected} at '{at}': build the package again")

    def _found(self, keys: tuple[Key, ...]) -> Any:
        found = self.content
        for key in keys:
            if isinstance(found, list) and isinstance(key, int):
                found = found[key] if key < len(found) else None
            else:
                found = found.get(key) if isinstance(found, dict) else None
        return found

    def _of(self, keys: tuple[Key, ...], kind: type[T], expected: str) -> T:
        found = self._found(keys)
        if not isinstance(found, kind):
            raise self._wrong(keys, expected)
        return found

    def holds(self, *keys: Key) -> bool:
        """Whether there is anything but null."""
        return self._found(keys) is not None

    def text(self, *keys: Key) -> str:
        """A text, on one line."""
        return clipped(self._of(keys, str, "text"))

    def texts(self, *keys: Key) -> tuple[str, ...]:
        """The texts of a list."""
        return tuple(self.text(*keys, index) for index in range(len(self._of(keys, list, "list"))))

    def flag(self, *keys: Key) -> bool:
        """True or false."""
        return self._of(keys, bool, "true or false")

    def number(self, *keys: Key) -> float:
        """A number, no larger than LARGEST."""
        found = self._found(keys)
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise self._wrong(keys, "number")
        if not abs(found) <= LARGEST:  # of NaN too
            raise self._wrong(keys, "number of a size that can be shown")
        return found

    def count(self, *keys: Key) -> int:
        """How many entries a list or an object has."""
        found = self._found(keys)
        if not isinstance(found, list | dict):
            raise self._wrong(keys, "list or object")
        return len(found)

    def part(self, *keys: Key) -> "Values":
        """What lies there: an object or a list."""
        self.count(*keys)
        return Values(self.file, self._found(keys), (*self.path, *keys))

    def parts(self, *keys: Key) -> "Iterator[tuple[str, Values]]":
        """The entries of an object by name, or of a list by number: each an object or a list."""
        part = self.part(*keys)
        every = part.content.keys() if isinstance(part.content, dict) else range(len(part.content))
        return ((clipped(str(key)), part.part(key)) for key in every)

    def names(self, *keys: Key) -> tuple[str, ...]:
        """The names in an object, as they are."""
        return tuple(self._of(keys, dict, "object"))

    def reasons(self, *keys: Key) -> dict[str, str]:
        """The texts of an object, by name."""
        return {clipped(name): self.text(*keys, name) for name in self.names(*keys)}

    def figure(self, *keys: Key, spec: str = "", scale: float = 1.0, unit: str = "") -> Figure:
        """A number as it is shown: times `scale`, by the format `spec`, with its `unit` behind it."""
        value = self.number(*keys)
        pointer = "".join(f"/{str(key).replace('~', '~0').replace('/', '~1')}" for key in (*self.path, *keys))
        shown = value if scale == 1 else value * scale
        return Figure(clipped(f"{shown:{spec}}{unit}"), value, clipped(f"{self.file.name}#{pointer}"))
