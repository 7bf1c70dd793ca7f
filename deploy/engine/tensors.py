"""The inputs and outputs of an engine, and how a request is cut into batches that the engine takes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from calib.errors import UserError

DTYPES = {
    "FLOAT": np.float32, "HALF": np.float16, "INT8": np.int8, "UINT8": np.uint8, "INT32": np.int32, "INT64": np.int64,
    "BOOL": np.bool_,
}  # fmt: skip
PROFILE = 0  # the only one that engines of this tool have


@dataclass(frozen=True)
class EngineTensor:
    """An input or output of an engine. `shape`: of one image, without the batch."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    def described(self) -> str:
        """The tensor as an error message names it."""
        return f"{self.dtype} (N, {', '.join(map(str, self.shape))})"


@dataclass(frozen=True)
class EngineTensors:
    """All inputs and outputs by name; the engine takes batches of `least` to `most` images."""

    inputs: Mapping[str, EngineTensor]
    outputs: Mapping[str, EngineTensor]
    least: int
    most: int


def _tensor(engine: Any, name: str) -> EngineTensor:
    kind = engine.get_tensor_dtype(name).name
    if kind not in DTYPES:
        raise UserError(f"tensor '{name}' of the engine has type {kind}: expected one of {', '.join(DTYPES)}")
    return EngineTensor(name, np.dtype(DTYPES[kind]), tuple(engine.get_tensor_shape(name))[1:])


def tensors_of(trt: ModuleType, engine: Any) -> EngineTensors:
    """What `engine` reads and writes, with its first optimization profile.

    Raises UserError for a type that numpy lacks, or for an engine without inputs.
    """
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    if not inputs:
        raise UserError("the engine has no input: expected one that takes images")
    limits = [engine.get_tensor_profile_shape(name, PROFILE) for name in inputs]
    return EngineTensors(
        {name: _tensor(engine, name) for name in inputs},
        {name: _tensor(engine, name) for name in names if name not in inputs},
        least=max(shapes[0][0] for shapes in limits),
        most=min(shapes[2][0] for shapes in limits),
    )


def require_inputs(tensors: EngineTensors, given: Mapping[str, np.ndarray]) -> int:
    """The number of images in `given`. Raises UserError unless it is what the engine takes: names, types and shapes."""
    if given.keys() != tensors.inputs.keys():
        raise UserError(f"the engine takes {', '.join(tensors.inputs)}, but was given {', '.join(given) or 'nothing'}")
    for name, array in given.items():
        expected = tensors.inputs[name]
        if array.dtype != expected.dtype or array.shape[1:] != expected.shape or not array.ndim:
            raise UserError(f"input '{name}' is {array.dtype} {array.shape}: expected {expected.described()}")
    counts = {name: len(array) for name, array in given.items()}
    if len({*counts.values()}) > 1:
        raise UserError(f"the inputs hold different numbers of images ({counts}): expected one number")
    return next(iter(counts.values()))


def batches(count: int, least: int, most: int) -> Iterator[slice]:
    """Cut `count` images into as few batches as possible, of nearly equal sizes from `least` to `most`.

    Raises UserError if there is no such cut.
    """
    parts = -(-count // most)
    if not parts or count // parts < least:
        raise UserError(f"{count} images cannot be cut into batches of {least} to {most}, which the engine takes")
    ends = [count * part // parts for part in range(parts + 1)]
    yield from map(slice, ends, ends[1:])
