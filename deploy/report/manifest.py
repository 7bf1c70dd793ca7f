"""manifest.json: provenance, what a loader must compare before it trusts the engine."""

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.errors import UserError
from calib.store.digests import file_sha256
from deploy import host
from deploy.graph.names import INPUT
from deploy.package import FILES, MANIFEST, read_json
from deploy.report.evidence import images_json, tool_commit, warnings

if TYPE_CHECKING:
    from deploy.engine.audit import Audit
    from deploy.engine.backends import Built
    from deploy.engine.build import Profile
    from deploy.execution import Execution
    from deploy.run import Run


Tensor = tuple[str, str, Sequence[int]]  # name, type, shape of one sample


def io_json(inputs: Sequence[Tensor], outputs: Sequence[Tensor], half: bool, profile: "Profile") -> dict[str, Any]:
    """Tensors of an engine with the batches of `profile`; floating ones are FP16 if `half`, else FP32."""
    floating, batches = "float16" if half else "float32", {"min": 1, "opt": profile.opt, "max": profile.maximum}
    return {
        kind: [
            {
                "name": name, "dtype": floating if dtype.startswith("float") else dtype,
                **{which: [batch, *shape] for which, batch in batches.items()},
            }
            for name, dtype, shape in tensors
        ]
        for kind, tensors in (("inputs", inputs), ("outputs", outputs))
    }  # fmt: skip


def files_json(folder: Path) -> dict[str, Any]:
    """sha256 and bytes of the files of the package in `folder`, but for the manifest itself."""
    return {
        name: {"sha256": file_sha256(folder / name), "bytes": os.path.getsize(folder / name)}
        for name in FILES
        if name != MANIFEST
    }


def engine_json(built: "Built", audit: "Audit", execution: "Execution") -> dict[str, Any]:
    """What a manifest tells of its engine."""
    return {
        "backend": built.backend,
        "version": built.version,
        "targets": list(built.targets),
        "settings": built.settings,
        "notes": list(built.notes),
        "audit": audit.to_json(),
        **execution.to_json(),
    }


def _io_json(run: "Run") -> dict[str, Any]:
    """Inputs and outputs of the engine: names, types, and shapes for the least, the usual and the largest batch."""
    named = run.loaded.inputs
    inputs: list[Tensor] = [(INPUT, "float32", run.loaded.data_config.get("input_size", ()))]
    if named is not None:
        inputs = [(each.name, each.dtype, each.shape) for each in named.each]
    outputs: list[Tensor] = [(each.name, "float32", each.shape) for each in run.outputs]
    return io_json(inputs, outputs, run.backend.FP16 and run.options.half, run.options.profile)


def _distinct(manifest: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """What tells packages of one name apart: in words -> (the value, how it is shown)."""
    inputs = [(each["name"], each["max"][1:]) for each in manifest["io"]["inputs"]]
    shown = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in inputs)
    weights, engine = manifest["weights"], manifest["engine"]
    return {
        "weights": (weights["sha256"], str(weights["source"])),
        "inputs": ([(name, list(shape)) for name, shape in inputs], shown),
        "target": (engine["backend"], str(engine["backend"])),
    }


def replaced(final: Path, manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a note where the package in `final` is of other weights, inputs or another target than the new `manifest`."""
    try:
        old, new = _distinct(read_json(final / MANIFEST)), _distinct(manifest)
    except (UserError, KeyError, TypeError, AttributeError):  # none there, or one of an older form
        return ()
    others = [f"{what} ({shown})" for what, (value, shown) in old.items() if value != new[what][0]]
    return (f"it replaces a package of other {' and '.join(others)}; another OUT= keeps both",) if others else ()


def manifest_json(run: "Run") -> dict[str, Any]:
    """Provenance: what a loader must compare before it trusts the engine."""
    return {
        "model": run.model.name,
        "warnings": warnings(run),
        "servable": not run.loaded.random and run.acceptance.accepted,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": files_json(run.folder),
        "weights": {
            "source": run.loaded.source,
            "sha256": run.loaded.sha256,
            "file_sha256": run.loaded.file_sha256,
            "random": run.loaded.random,
            "module": run.loaded.module,
        },
        "calibration": images_json(run.calibration),
        "preprocessing": None if run.loaded.inputs else run.calibration.preprocessing.to_json(),
        "recipe": run.recipe.to_json(),
        "calibration_cache": run.taken.get("calibrate"),
        "engine_cache": run.taken.get("build"),
        "floats": run.options.floats,  # of model.onnx, beside its integers
        "planned_int8_layers": list(run.planned),
        "kept_float": run.model.kept_float,
        "engine": engine_json(run.built, run.audit, run.execution),
        "acceptance": run.acceptance.to_json(),
        "task": run.task.name,
        "boxes": run.task.boxes and run.task.boxes.to_json(),
        "io": _io_json(run),
        "host": host.describe(),
        "commit": tool_commit(),
    }
