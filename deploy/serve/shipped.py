"""What a server must know of a package, read from its manifest.

The manifest is of any origin: every field that is used is checked, and none becomes a path or a name unchecked.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from calib.errors import UserError
from calib.images.preprocess import Preprocessing
from calib.store.digests import file_sha256
from calib.task import BOXES, Boxes, boxes_of
from deploy.package import ENGINE, MANIFEST, read_json
from deploy.verify import require_package

FLOATS = ("float16", "float32")
DTYPES = (*FLOATS, "int64", "int32", "bool")  # of named inputs
LARGEST = 1 << 16  # of a batch, of an edge of an image, of any other axis
MODEL_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}"  # of a folder in a model repository, and a part of an URL
TENSOR_NAME = r"[\w.:/-]{1,256}"
TEXT = r"[^\x00-\x1f]{1,256}"
TARGET = r"SM[0-9]{2,3}\+?|CPU \w{1,32}"  # with a plus: and later ones

T = TypeVar("T")


@dataclass(frozen=True)
class ServedTensor:
    """An input or output of the engine: its dtype, one of DTYPES, and its shape without the batch axis.

    Outputs are floating. Only a named input may have the shape (): one number per sample.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Shipped:
    """A package as its server sees it.

    `id`: sha256 (hex) of the manifest, which itself holds that of every file. `opt`, `largest`: batch sizes that the engine
    is tuned for and accepts. `preprocessing`: None where the network takes named inputs and no image. `boxes`: how the
    outputs of a detector become boxes, None for any other network. `targets`: GPU architectures, such as "SM89", or "SM120+"
    for this and later ones; or CPUs. `executed`: whether the engine was ever run. `failed`: the limits
    (deploy/acceptance.py) that it does not keep, with what was measured. `driver`: NVIDIA driver of the host that built it,
    None without one. `bytes`: of all files together.
    """

    folder: Path
    id: str
    model: str
    task: str
    inputs: tuple[ServedTensor, ...]
    outputs: tuple[ServedTensor, ...]
    opt: int
    largest: int
    preprocessing: Preprocessing | None
    boxes: Boxes | None
    backend: str
    version: str
    targets: tuple[str, ...]
    executed: bool
    failed: tuple[str, ...]
    random: bool
    sample: bool
    driver: str | None
    engine_bytes: int
    bytes: int

    @property
    def contract(self) -> tuple[object, ...]:
        """What clients rely on: a package may replace another under the same name only where these are equal."""
        return self.inputs, self.outputs, self.largest, self.preprocessing, self.task, self.boxes


class _Manifest:
    """Checked access to the fields of a manifest; `at` tells which in the message."""

    def __init__(self, path: Path) -> None:
        self.path, self.values = path, read_json(path)

    def wrong(self, what: str, expected: str) -> UserError:
        return UserError(f"'{self.path}': {what}, expected {expected}; build the package again")

    def get(self, at: str, kind: type[T], values: Mapping[str, Any] | None = None) -> T:
        """The field `at`, dots between levels, of type `kind` (a bool is no int)."""
        found: Any = self.values if values is None else values
        for key in at.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
            raise self.wrong(f"'{at}' is {type(found).__name__}", kind.__name__)
        return found

    def text(self, at: str, pattern: str, values: Mapping[str, Any] | None = None) -> str:
        found = self.get(at, str, values)
        if not re.fullmatch(pattern, found):
            raise self.wrong(f"'{at}' is {found[:80]!r}", f"a text of the form {pattern}")
        return found

    def shape(self, at: str, values: Mapping[str, Any], least: int) -> tuple[int, ...]:
        found = self.get(at, list, values)
        if not least <= len(found) <= 8 or not all(type(each) is int and 1 <= each <= LARGEST for each in found):
            expected = f"{least} to 8 whole numbers from 1 to {LARGEST}"
            raise self.wrong(f"'{at}' of a tensor is {str(found)[:80]}", expected)
        return tuple(found)


def _tensors(
    manifest: _Manifest, kind: str, dtypes: Sequence[str] = FLOATS, least: int = 2
) -> tuple[tuple[ServedTensor, ...], tuple[int, int]]:
    """(the tensors of `kind`, the usual and the largest batch size). `least`: the fewest axes, with that of the batch."""
    found, batches = [], set()
    for each in manifest.get(f"io.{kind}", list):
        values = each if isinstance(each, dict) else {}
        shapes = [manifest.shape(which, values, least) for which in ("min", "opt", "max")]
        if len({shape[1:] for shape in shapes}) != 1:
            raise manifest.wrong(f"'io.{kind}' has a tensor of shapes {shapes}", "one shape but for the batch")
        dtype = manifest.text("dtype", "|".join(dtypes), values)
        found.append(ServedTensor(manifest.text("name", TENSOR_NAME, values), dtype, shapes[0][1:]))
        batches.add(tuple(shape[0] for shape in shapes))
    if not found or len({each.name for each in found}) != len(found) or len(batches) != 1:
        raise manifest.wrong(f"'io.{kind}' lists no tensors, or several of one name or of other batches", "each once")
    least, opt, largest = batches.pop()
    if not 1 == least <= opt <= largest:
        raise manifest.wrong(f"'io.{kind}' has batches {least}, {opt}, {largest}", "1 <= usual <= largest")
    return tuple(found), (opt, largest)


def _preprocessing(manifest: _Manifest) -> Preprocessing | None:
    """How images become the input; None where the manifest says that there are none."""
    if manifest.values.get("preprocessing", "") is None:
        return None
    values = manifest.get("preprocessing", dict)
    for edge in ("height", "width", "resize_height", "resize_width"):
        if not 1 <= manifest.get(edge, int, values) <= LARGEST:
            raise manifest.wrong(f"preprocessing '{edge}' is {values[edge]}", f"1 to {LARGEST} pixels")
    for each in ("mean", "std"):
        numbers = manifest.get(each, list, values)
        if (
            len(numbers) != 3
            or not all(isinstance(one, int | float) for one in numbers)
            or (each == "std" and 0 in numbers)
        ):
            raise manifest.wrong(f"preprocessing '{each}' is {str(numbers)[:80]}", "three numbers, one per channel")
    for each in ("interpolation", "crop_mode"):
        manifest.get(each, str, values)
    return Preprocessing.from_json(values)


def _boxes(
    manifest: _Manifest, task: str, outputs: Sequence[ServedTensor], images: Preprocessing | None
) -> Boxes | None:
    """How the outputs of a detector become boxes; None where the task is another."""
    described = manifest.values.get("boxes")
    if task != BOXES and described is None:
        return None
    if task != BOXES or not isinstance(described, dict):
        raise manifest.wrong(
            f"'boxes' is {type(described).__name__} and the task {task!r}", f"both of the task {BOXES!r}"
        )
    said = boxes_of(described, {each.name: each.shape for each in outputs}, f"'{manifest.path}'")
    if images and said.image != (images.height, images.width):
        raise manifest.wrong(f"'boxes' has the image {said.image}", f"({images.height}, {images.width}) as the input")
    return said


def _failed(manifest: _Manifest) -> tuple[str, ...]:
    """The limits (deploy/acceptance.py) that the package does not keep, with what was measured."""
    found = []
    if "acceptance" not in manifest.values:  # of an older version, which knew no limits
        return ()
    for each in manifest.get("acceptance.checks", list):
        values = each if isinstance(each, dict) else {}
        if not manifest.get("kept", bool, values):
            found.append(f"{manifest.text('limit', TEXT, values)}: {manifest.text('measured', TEXT, values)}")
    return tuple(found)


def shipped_from_package(folder: Path) -> Shipped:
    """Read the manifest of the package at `folder`.

    Raises UserError if there is none, or if a field is missing or not of the form that `make engine` writes.
    """
    require_package(folder)
    manifest = _Manifest(folder / MANIFEST)
    preprocessing = _preprocessing(manifest)
    inputs, batches = _tensors(manifest, "inputs") if preprocessing else _tensors(manifest, "inputs", DTYPES, least=1)
    outputs, of_outputs = _tensors(manifest, "outputs")
    if of_outputs != batches:
        raise manifest.wrong(f"'io' has inputs in batches of {batches}, outputs of {of_outputs}", "equal ones")
    if preprocessing and [each.shape for each in inputs] != [(3, preprocessing.height, preprocessing.width)]:
        image = f"one input (3, {preprocessing.height}, {preprocessing.width})"
        raise manifest.wrong("'io' has other inputs than its preprocessing makes", image)
    targets = manifest.get("engine.targets", list)
    if not targets or not all(isinstance(each, str) and re.fullmatch(TARGET, each) for each in targets):
        raise manifest.wrong(f"'engine.targets' is {str(targets)[:80]}", "GPU architectures such as SM89, or a CPU")
    files, driver = manifest.get("files", dict), manifest.get("host", dict).get("driver")
    if not (driver is None or (isinstance(driver, str) and re.fullmatch(r"[0-9]+(\.[0-9]+)+", driver))):
        raise manifest.wrong(f"'host.driver' is {str(driver)[:80]!r}", "the version of a driver, or null")
    task = manifest.text("task", r"[a-z_]{1,64}")
    return Shipped(
        folder=folder,
        id=file_sha256(folder / MANIFEST),
        model=manifest.text("model", TEXT),
        task=task,
        inputs=inputs,
        outputs=outputs,
        opt=batches[0],
        largest=batches[1],
        preprocessing=preprocessing,
        boxes=_boxes(manifest, task, outputs, preprocessing),
        backend=manifest.text("engine.backend", r"[a-z_]{1,64}"),
        version=manifest.text("engine.version", r"[0-9]+(\.[0-9]+){2,3}\w*"),
        targets=tuple(targets),
        executed=manifest.values["engine"].get("executed") is True,
        failed=_failed(manifest),
        random=manifest.get("weights.random", bool),
        sample=manifest.get("calibration.sample", bool),
        driver=driver,
        engine_bytes=manifest.get("bytes", int, files.get(ENGINE) or {}),
        bytes=sum(manifest.get("bytes", int, each if isinstance(each, dict) else {}) for each in files.values()),
    )


def served_name(shipped: Shipped, name: str | None = None) -> str:
    """The name that a server gives the model: `name`, or that of the package. Raises UserError if none can be made of it."""
    found = name or shipped.model.replace("/", "_").replace(":", ".")
    if not re.fullmatch(MODEL_NAME, found):
        raise UserError(f"'{found}' is no name of a served model: expected letters, digits, _ . and -; give --name")
    return found
