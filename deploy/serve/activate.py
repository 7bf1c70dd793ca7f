"""Switches a running Triton server to another version of a model, and back.

What a server loads when it starts is what `<model>/config.pbtxt` names: one version. So the steps of `activate` are

1. write the new version beside the folder it will be, and rename it: nothing names it yet;
2. let the server load it under its own configuration, sent with the request: the old version serves until it is ready;
3. ask it: the golden samples of its package, and an image file through the ensemble where there is one;
4. put its configuration in place of the old one, by rename. From here on it is the version of the model.

Where 2 or 3 fail, the server loads what config.pbtxt names, which is the old version, and the new folder goes. A kill at any
point leaves config.pbtxt naming a whole version that has been asked; the next run removes what it left behind.
"""

import contextlib
import io
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image

from calib.errors import UserError
from deploy.errors import ContractError
from deploy.lock import HeldError, locked
from deploy.measure.accuracy import joined_rows, mean_sqnr_db
from deploy.measure.onnx_runner import Given
from deploy.measure.outputs import Outputs
from deploy.package import GOLDEN
from deploy.serve.bundle import models_of, require_unchanged
from deploy.serve.configs import CPU, CPU_DTYPE, IMAGE, JPEG, LABELS, config_from_text, served_version
from deploy.serve.preflight import Allowed
from deploy.serve.repository import (
    CONFIG,
    engine_obstacle,
    write_cpu_version,
    write_engine_version,
)
from deploy.serve.shipped import FLOATS, Shipped, shipped_from_package
from deploy.verify import MAX_DRIFT_DB, golden_arrays, least_fp16_db

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

INCOMING = "incoming-"  # Triton takes no folder for a version whose name is no number
LOCK = ".activate.lock"


class Asked(Protocol):
    """The server, as far as a switch needs it (deploy/serve/client.py)."""

    def require_live(self) -> None:
        """Raise UserError if it does not answer."""

    def load(self, model: str, config: "ModelConfig | None" = None) -> None:
        """Load the model as `config` says, or as the file in its folder does."""

    def ready(self, model: str) -> bool:
        """Whether the model serves."""

    def answer(self, model: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs of the model by name."""


@contextmanager
def _alone(repository: Path) -> Iterator[None]:
    """Hold the repository's lock. Raises UserError while another run holds it, or where nothing can be written."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(repository / LOCK))
        except HeldError:
            raise UserError(f"another run switches versions in '{repository}': wait until it has ended") from None
        except OSError as error:
            raise UserError(
                f"repository '{repository}' cannot be written ({error.strerror}): expected a folder"
            ) from error
        yield


def _config(path: Path) -> "ModelConfig":
    from google.protobuf.text_format import ParseError

    try:
        config = config_from_text(path.read_text())
        served_version(config)
    except (OSError, ValueError, ParseError) as error:
        raise UserError(f"'{path}' is no configuration of this tool ({error}): write the repository again") from error
    return config


def _installed(repository: Path, name: str) -> list[str]:
    """The models of `name` in the repository that hold versions of a package. Raises UserError if there are none."""
    found = [each for each in (name, name + CPU) if (repository / each / CONFIG).is_file()]
    if not found:
        raise UserError(
            f"'{repository}' holds no model '{name}': expected one written with make serve-repo; give --name"
        )
    return found


def _versions(folder: Path) -> list[int]:
    return sorted(int(each.name) for each in folder.iterdir() if each.name.isdigit() and each.is_dir())


def _remove_leftovers(folder: Path, current: int) -> None:
    """Remove what killed runs left behind, and versions that were given up: all above the one that serves."""
    for each in [*folder.glob(f"{INCOMING}*"), *(folder / str(one) for one in _versions(folder) if one > current)]:
        shutil.rmtree(each)


def _put_in_place(folder: Path, version: int) -> None:
    """Make `version` the version of the model in `folder`, in one step."""
    half = folder / f".{CONFIG}"
    with half.open("wb") as file:
        file.write((folder / str(version) / CONFIG).read_bytes())
        file.flush()
        os.fsync(file.fileno())
    half.replace(folder / CONFIG)


def _install(packages: Sequence[Shipped], folder: Path, version: int) -> None:
    """Write the packages as a version of the model in `folder`; it appears when it is whole."""
    write = write_cpu_version if folder.name.endswith(CPU) else write_engine_version
    half = folder / f"{INCOMING}{version}"
    write(packages, half, folder.name, version, (folder / LABELS).exists())
    half.rename(folder / str(version))


def golden_fault(folder: Path, answer: Callable[[Given], Outputs], engine: bool) -> str | None:
    """A sentence if answers to the golden samples in `folder` are further from the float network than recorded, or None.

    `answer`: images float32 (N, 3, H, W), or named inputs (N, ...) -> outputs by name. `engine`: they come from the engine,
    whose types are FP16.
    """
    given, reference, simulated = golden_arrays(folder / GOLDEN)
    recorded = mean_sqnr_db(joined_rows(reference), joined_rows(simulated, reference))
    least = least_fp16_db(recorded) if engine else recorded - MAX_DRIFT_DB
    answers = {name: value.astype(np.float32) for name, value in answer(given).items()}
    if answers.keys() != reference.keys() or any(answers[name].shape != reference[name].shape for name in reference):
        return (
            f"it returns {', '.join(f'{name} {value.shape}' for name, value in answers.items())} to the golden samples"
        )
    found = mean_sqnr_db(joined_rows(reference), joined_rows(answers, reference))
    if found >= least:
        return None
    return f"it reaches {found:.1f} dB on the golden samples, expected {least:.1f} dB or more"


def _sent(shipped: Shipped, golden: Given, engine: bool) -> dict[str, np.ndarray]:
    """The golden samples as a client sends them: by name, in the model's types, one number per sample as (N, 1).

    Raises UserError where they are not the inputs of the package.
    """
    arrays = {shipped.inputs[0].name: golden} if isinstance(golden, np.ndarray) else golden
    sent = {}
    for each in shipped.inputs:
        if each.name not in arrays or arrays[each.name].shape[1:] != each.shape:
            raise UserError(f"{GOLDEN} of '{shipped.folder}' has no samples of '{each.name}': build the package again")
        dtype = each.dtype if engine or each.dtype not in FLOATS else CPU_DTYPE
        array = arrays[each.name].astype(dtype)
        sent[each.name] = array if each.shape else array[:, None]
    return sent


def _picture() -> np.ndarray:
    """A JPEG file, as the ensemble takes it: (1, 1) bytes."""
    file = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(file, "JPEG")
    return np.array([[file.getvalue()]], dtype=object)


def _fault(server: Asked, folder: Path, version: int) -> str | None:
    """A sentence if the version that the server has just loaded answers wrongly, or None."""
    model, shipped = folder.name, shipped_from_package(folder / str(version))
    engine = not model.endswith(CPU)

    def answer(golden: Given) -> Outputs:
        given = _sent(shipped, golden, engine)
        count = len(next(iter(given.values())))
        parts = [slice(start, start + shipped.largest) for start in range(0, count, shipped.largest)]
        found = [server.answer(model, {name: array[part] for name, array in given.items()}) for part in parts]
        return {name: np.concatenate([each[name] for each in found]) for name in found[0]}

    if reason := golden_fault(folder / str(version), answer, engine):
        return reason
    if shipped.preprocessing and server.ready(model + JPEG):
        outputs = server.answer(model + JPEG, {IMAGE: _picture()})
        if not all(np.isfinite(each).all() for each in outputs.values()):
            return "its answer to an image file is not finite"
    return None


def _switch(server: Asked, repository: Path, versions: dict[str, int]) -> None:
    """Let the server serve these versions by model, ask each, and make them what the repository names.

    Where one does not load or answers wrongly, all serve again what the repository named, and ContractError is raised.
    """
    tried = []
    try:
        for model, version in versions.items():
            tried.append(model)
            server.load(model, _config(repository / model / str(version) / CONFIG))
            if reason := _fault(server, repository / model, version):
                raise ContractError(f"version {version} of '{model}' answers wrongly: {reason}")
    except BaseException:
        for model in tried:
            with contextlib.suppress(ContractError, UserError):
                server.load(model)
        raise
    for model, version in versions.items():
        _put_in_place(repository / model, version)


def _replaceable(folder: Path, packages: Sequence[Shipped], allowed: Allowed) -> int:
    """The version that the model in `folder` serves. Raises UserError if `packages` may not replace it."""
    reasons = [engine_obstacle(each, allowed) for each in packages]
    if not folder.name.endswith(CPU) and any(reasons):
        raise UserError(
            f"'{folder.name}' serves an engine: {next(filter(None, reasons))}; build one, or choose another --name"
        )
    version = served_version(_config(folder / CONFIG))
    if shipped_from_package(folder / str(version)).contract != packages[0].contract:
        raise UserError(
            f"'{packages[0].folder}' has other tensors, batches or preprocessing than '{folder.name}' in '{folder.parent}': "
            f"its clients would send it the wrong thing; write a repository of its own, or give --name"
        )
    return version


def activate(
    packages: Sequence[Shipped], repository: Path, server: Asked, name: str | None, allowed: Allowed
) -> dict[str, tuple[int, int]]:
    """Install the packages as new versions of the models of `name`, or of their own names, and switch the server to them.

    Returns model -> (version before, version now). Raises UserError if they are not what the repository serves under these
    names, and ContractError if a new version does not load or answers wrongly: then the old ones serve, all of them.
    """
    groups = models_of(packages, name)
    server.require_live()
    with _alone(repository):
        require_unchanged(repository)
        given = {model: group for each, group in groups.items() for model in _installed(repository, each)}
        before = {model: _replaceable(repository / model, group, allowed) for model, group in given.items()}
        for model, version in before.items():
            _remove_leftovers(repository / model, version)
        now = {model: version + 1 for model, version in before.items()}
        try:
            for model, version in now.items():
                _install(given[model], repository / model, version)
            _switch(server, repository, now)
        except BaseException:
            for model, version in before.items():
                if served_version(_config(repository / model / CONFIG)) == version:
                    _remove_leftovers(repository / model, version)
            raise
    return {model: (version, now[model]) for model, version in before.items()}


def rollback(repository: Path, server: Asked, *names: str) -> dict[str, tuple[int, int]]:
    """Switch the models of `names` to the versions before those that serve; the result is that of `activate`.

    Raises UserError if there is none, and ContractError if one does not load or answers wrongly.
    """
    server.require_live()
    with _alone(repository):
        models = [model for name in dict.fromkeys(names) for model in _installed(repository, name)]
        before = {model: served_version(_config(repository / model / CONFIG)) for model in models}
        now = {}
        for model, version in before.items():
            older = [each for each in _versions(repository / model) if each < version]
            if not older:
                raise UserError(
                    f"'{model}' serves version {version}: expected an older one in '{repository}' to go back to"
                )
            now[model] = older[-1]
        _switch(server, repository, now)
    return {model: (version, now[model]) for model, version in before.items()}
