"""The arithmetic on shapes in the program text of a TensorRT-RTX engine: what every named dimension is for one batch size.

    shape_main {
      copy={ name=".." output={"n" } input={"x_shapeInput.1" } .. }
      memset={ name=".." output={"__s^64i64" }  src="64i64" .. }
      mul={ name=".." output={"m" } input={"n" "__s^64i64" } .. }
    }

The input is the number of images; comparisons, which guard launches, are not computed.
"""

import re
from collections.abc import Callable, Mapping, Sequence

_NAMES = r'=\{((?:\s*"[^"]*")*)\s*\}'
_STEP = re.compile(r"^  (\w+)=\{ (.*)$", re.MULTILINE)
_OUTPUT, _INPUT = re.compile(" output" + _NAMES), re.compile(" input" + _NAMES)
_CONSTANT = re.compile(r' src="(-?\d+)i64"')
_SHAPE_INPUTS = re.compile("^  shape_inputs" + _NAMES, re.MULTILINE)
_OPERATIONS: dict[str, Callable[..., int]] = {
    "copy": lambda value: value,
    "add": lambda left, right: left + right,
    "sub": lambda left, right: left - right,
    "mul": lambda left, right: left * right,
    "div": lambda left, right: int(left / right),  # towards zero, as C++ does
    "min": min,
    "max": max,
}


def names_from(pattern: re.Pattern[str], text: str) -> tuple[str, ...]:
    """The quoted names in the first match of `pattern`, whose first group they are; empty without a match."""
    found = pattern.search(text)
    return tuple(re.findall('"([^"]*)"', found[1])) if found else ()


def dimensions(header: str, shape_main: str, batch: int) -> dict[str, int]:
    """The value of every number that `shape_main` computes for a `batch`; those it cannot compute are left out.

    `header` names the inputs. Networks of this tool have one, the number of images.
    """
    values = dict.fromkeys(names_from(_SHAPE_INPUTS, header), batch)
    for operation, text in _STEP.findall(shape_main):
        outputs, inputs = names_from(_OUTPUT, text), names_from(_INPUT, text)
        if operation == "memset" and (constant := _CONSTANT.search(text)):
            values |= dict.fromkeys(outputs, int(constant[1]))
        elif operation in _OPERATIONS and all(name in values for name in inputs):
            values |= dict.fromkeys(outputs, _OPERATIONS[operation](*(values[name] for name in inputs)))
    return values


def shape(dims: Sequence[str], values: Mapping[str, int]) -> tuple[int, ...] | None:
    """The shape with these `dims`, numbers or names, where named numbers have these `values`; None if one has none."""
    found = [int(dim) if dim.isdigit() else values.get(dim) for dim in dims]
    return tuple(value for value in found if value is not None) if None not in found else None
