"""Writes packages as a Triton model repository: `<model>/config.pbtxt`, and `<model>/<version>/` with what it loads.

A version folder holds everything of its version, its own configuration too, so that to switch the server to another version
is to put that configuration in place (deploy/serve/activate.py).
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from calib.errors import UserError
from calib.store.digests import file_sha256
from deploy.engine.backends import ONNXRUNTIME, TENSORRT
from deploy.lock import HeldError, locked
from deploy.package import ENGINE, GOLDEN, MANIFEST, MODEL_FP32
from deploy.serve.bundle import copy_files, models_of, require_files
from deploy.serve.configs import (
    CPU,
    CPU_DTYPE,
    DECODE,
    JPEG,
    LABELS,
    PLAN,
    PREPROCESS,
    cpu_config,
    decode_config,
    engine_config,
    jpeg_config,
    preprocess_config,
    text_from_config,
)
from deploy.serve.preflight import Allowed
from deploy.serve.shipped import Shipped
from deploy.verify import recorded_sha256

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

ROOT = Path(__file__).parents[2]
CONFIG, MODEL_PY, PREPROCESSING, BOXES_JSON = "config.pbtxt", "model.py", "preprocessing.json", "boxes.json"
FIRST = 1  # version
# The files of this tool that the models in Python import: they run where the tool is not installed.
SELF_TEST = ("deploy/serve/models/self_test.py",)
CPU_CODE = (*SELF_TEST, "deploy/measure/onnx_runner.py", "deploy/measure/ort_options.py")
DECODE_CODE = (*SELF_TEST, "calib/errors.py", "calib/task.py", "deploy/measure/boxes.py", "deploy/measure/outputs.py")
PREPROCESS_CODE = (*SELF_TEST, "calib/errors.py", "calib/images/preprocess.py")


def engine_obstacle(shipped: Shipped, allowed: Allowed) -> str | None:
    """The reason why the repository cannot hold the package's engine, or None."""
    if shipped.backend != TENSORRT:
        return f"{ENGINE} is of {shipped.backend}, and Triton loads engines of {TENSORRT} only (TARGET=tensorrt)"
    if not (shipped.executed or allowed.unexecuted):
        return f"{ENGINE} was never run (--allow-unexecuted serves it all the same)"
    return None


def _copy(shipped: Shipped, file: str, target: Path) -> None:
    """Copy a file of the package. Raises UserError if the copy is not what the manifest says."""
    shutil.copyfile(shipped.folder / file, target)
    if file_sha256(target) != recorded_sha256(shipped.folder / MANIFEST)[file]:
        raise UserError(f"'{shipped.folder / file}' has changed since it was built (sha256 differs): build it again")


def _code(files: Sequence[str], model: str, folder: Path) -> None:
    """Put the model in Python and the files that it imports into `folder`."""
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, folder / file)
    shutil.copyfile(ROOT / "deploy/serve/models" / model, folder / MODEL_PY)


def _evidence(shipped: Shipped, folder: Path) -> None:
    """What the version is checked against after it has been loaded."""
    _copy(shipped, GOLDEN, folder / GOLDEN)
    shutil.copyfile(shipped.folder / MANIFEST, folder / MANIFEST)
    if file_sha256(folder / MANIFEST) != shipped.id:
        raise UserError(
            f"'{shipped.folder / MANIFEST}' changed while it was read: leave the package as it is meanwhile"
        )


def write_cpu_version(packages: Sequence[Shipped], folder: Path, name: str, version: int, labels: bool) -> None:
    """Make `folder` the version `version` of the model that runs the first package's graph in ONNX Runtime.

    The graph is the engine where ONNX Runtime is what that was built for.
    """
    folder.mkdir(parents=True)
    graph = ENGINE if packages[0].backend == ONNXRUNTIME else MODEL_FP32
    _copy(packages[0], graph, folder / graph)
    _evidence(packages[0], folder)
    _code(CPU_CODE, "cpu.py", folder)
    (folder / CONFIG).write_text(text_from_config(cpu_config(packages[0], name, version, labels)))


def _capability(target: str) -> str:
    """Triton's name of a GPU architecture: SM89 -> 8.9, SM120 -> 12.0."""
    digits = target.removeprefix("SM")
    return f"{digits[:-1]}.{digits[-1]}"


def write_engine_version(packages: Sequence[Shipped], folder: Path, name: str, version: int, labels: bool) -> None:
    """Make `folder` the version `version` of the model that runs the engines of the packages."""
    folder.mkdir(parents=True)
    plans: dict[str, str] = {}
    md5: dict[str, str] = {}
    for each in packages:
        file = PLAN if len(packages) == 1 else f"model_{each.targets[0].lower()}.plan"
        _copy(each, ENGINE, folder / file)
        plans |= {_capability(target): file for target in each.targets}
        # the only digest that Triton's agent knows; against accidents, as the sha256 of the manifest
        md5[f"{version}/{file}"] = hashlib.md5((folder / file).read_bytes(), usedforsecurity=False).hexdigest()
    _evidence(packages[0], folder)
    (folder / CONFIG).write_text(text_from_config(engine_config(packages[0], name, version, plans, md5, labels)))


def _companions(shipped: Shipped, repository: Path, name: str, dtype: str | None, labels: Path | None) -> None:
    """What makes tensors of images for the model `name`, what makes boxes of its outputs, and the ensemble of all."""
    assert shipped.preprocessing
    preprocess, jpeg = repository / (name + PREPROCESS), repository / (name + JPEG)
    for folder in (preprocess, jpeg):
        (folder / str(FIRST)).mkdir(parents=True)
    _code(PREPROCESS_CODE, "preprocess.py", preprocess / str(FIRST))
    (preprocess / str(FIRST) / PREPROCESSING).write_text(json.dumps(shipped.preprocessing.to_json(), indent=2) + "\n")
    if shipped.boxes:
        boxes = repository / (name + DECODE)
        (boxes / str(FIRST)).mkdir(parents=True)
        _code(DECODE_CODE, "boxes.py", boxes / str(FIRST))
        (boxes / str(FIRST) / BOXES_JSON).write_text(json.dumps(shipped.boxes.to_json(), indent=2) + "\n")
        _configure(boxes, decode_config(shipped, name, FIRST, dtype))
    tensor_dtype = dtype or shipped.inputs[0].dtype
    _configure(preprocess, preprocess_config(shipped, name, FIRST, tensor_dtype))
    _configure(jpeg, jpeg_config(shipped, name, FIRST, dtype, labels is not None), labels)


def _configure(folder: Path, config: "ModelConfig", labels: Path | None = None) -> None:
    (folder / CONFIG).write_text(text_from_config(config))
    if labels is not None:
        shutil.copyfile(labels, folder / LABELS)


def _checked_labels(labels: Path, shipped: Shipped) -> None:
    """Raise UserError unless the file names every class of the classifier, one a line."""
    try:
        lines = labels.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"labels '{labels}' cannot be read ({error}): expected a text file, one class a line"
        ) from error
    classes = shipped.outputs[0].shape[0]
    if shipped.task != "classifier" or len(lines) != classes or not all(line.strip() for line in lines):
        raise UserError(
            f"labels '{labels}' has {len(lines)} lines: expected one for each of the {classes} values of a classifier "
            f"(this network returns {shipped.task})"
        )


def write_models(
    packages: Sequence[Shipped], repository: Path, name: str, allowed: Allowed, labels: Path | None
) -> tuple[str, ...]:
    """Write the models of one network into the folder `repository`; returns their names, those for clients first."""
    shipped, names = packages[0], [name + CPU]
    write_cpu_version(packages, repository / (name + CPU) / str(FIRST), name + CPU, FIRST, labels is not None)
    if shipped.preprocessing:
        _companions(shipped, repository, name + CPU, CPU_DTYPE, labels)
    if all(engine_obstacle(each, allowed) is None for each in packages):
        write_engine_version(packages, repository / name / str(FIRST), name, FIRST, labels is not None)
        if shipped.preprocessing:
            _companions(shipped, repository, name, None, labels)
        names.insert(0, name)
    for each in names:
        folder = repository / each
        shutil.copyfile(folder / str(FIRST) / CONFIG, folder / CONFIG)
        if labels is not None:
            shutil.copyfile(labels, folder / LABELS)
    return (*names, *(each + JPEG for each in names)) if shipped.preprocessing else tuple(names)


def _write_all(
    models: Mapping[str, Sequence[Shipped]],
    repository: Path,
    allowed: Allowed,
    labels: Path | None,
    files: Sequence[Path],
) -> tuple[str, ...]:
    """Write everything into the folder `repository`; returns the names of the models for clients."""
    names = [each for name, group in models.items() for each in write_models(group, repository, name, allowed, labels)]
    copy_files(files, repository)
    return tuple(names)


def write_repository(
    packages: Sequence[Shipped],
    repository: Path,
    name: str | None,
    allowed: Allowed,
    labels: Path | None = None,
    files: Sequence[Path] = (),
) -> tuple[str, ...]:
    """Write a new model repository, which appears when it is whole; returns the names of the models for clients.

    `name`: of the one model that the packages are; None: each has its own. `files`: what lies beside the models.
    Raises UserError if packages of one name are not one model, if `labels` or `files` do not fit, or if something lies at
    `repository`.
    """
    models = models_of(packages, name)
    require_files(files, models)
    if labels is not None:
        if len(models) > 1:
            raise UserError(f"LABELS= names the classes of one model, not of {len(models)}: leave it out")
        _checked_labels(labels, packages[0])
    if repository.is_symlink() or (repository.exists() and not (repository.is_dir() and not any(repository.iterdir()))):
        raise UserError(
            f"'{repository}' exists already: expected a new folder; install a new version into it with `python -m deploy "
            f"activate`, or choose another with REPO="
        )
    half = repository.parent / f".{repository.name}.incoming"
    try:
        repository.parent.mkdir(parents=True, exist_ok=True)
        with locked(repository.parent / f".{repository.name}.lock"):
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(half)  # of a killed run
            try:
                names = _write_all(models, half, allowed, labels, files)
                half.replace(repository)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(half)
    except HeldError:
        raise UserError(f"another run is writing '{repository}': wait until it has ended") from None
    except OSError as error:
        raise UserError(f"repository '{repository}' cannot be written ({error.strerror}): choose another") from error
    return names
