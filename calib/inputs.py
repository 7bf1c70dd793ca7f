"""The inputs of a network by name: what a sample consists of. No torch."""

import math
from dataclasses import asdict, dataclass
from typing import Any

DTYPES = ("float32", "int64", "int32", "bool")


@dataclass(frozen=True)
class Input:
    """One input. `dtype`: one of DTYPES; `shape`: of one sample, without the batch axis."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of its values in one sample."""
        return math.prod(self.shape)

    def described(self) -> str:
        """The input as a message names it."""
        return f"{self.name} {self.dtype} ({', '.join(map(str, ('N', *self.shape)))})"


@dataclass(frozen=True)
class Inputs:
    """All inputs, in the order in which their values follow each other in a row."""

    each: tuple[Input, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Their names, in order."""
        return tuple(one.name for one in self.each)

    def described(self) -> str:
        """The inputs as a message names them."""
        return ", ".join(one.described() for one in self.each)

    def to_json(self) -> dict[str, Any]:
        """Plain values, which also tell rows of one kind from those of another."""
        return {"inputs": [asdict(one) for one in self.each]}
