"""The runner for the engine of a finished package."""

from pathlib import Path

from calib.errors import UserError
from deploy.engine.backends import backends
from deploy.engine.device import Device
from deploy.engine.graph_runner import GraphRunner
from deploy.engine.runner import EngineRunner
from deploy.package import ENGINE, MANIFEST, read_json


def runner_of_package(
    folder: Path, device: Device | None = None, kernels_file: Path | None = None
) -> EngineRunner | GraphRunner:
    """What runs the engine of the package in `folder`, inside its `with`.

    Raises UserError for a folder without one, or where its backend cannot run, with the reason.
    """
    engine = read_json(folder / MANIFEST).get("engine")
    name = engine.get("backend") if isinstance(engine, dict) else None
    if name not in backends():
        raise UserError(f"'{folder / MANIFEST}' names the backend {name!r}: expected one of {', '.join(backends())}")
    if reason := backends()[name].cannot_run():
        raise UserError(f"the engine in '{folder}' cannot run here: {name}: {reason}")
    try:
        plan = (folder / ENGINE).read_bytes()
    except OSError as error:
        raise UserError(f"'{folder / ENGINE}' cannot be read ({error.strerror}): build the package again") from error
    return backends()[name].runner(plan, device, kernels_file)
