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
    from deploy.run import Run


def _io_json(run: "Run") -> dict[str, Any]:
    """Inputs and outputs of the engine: names, types, and shapes for the least, the usual and the largest batch."""
    profile, named = run.options.profile, run.loaded.inputs
    half = run.backend.FP16 and run.options.half
    floating = "float16" if half else "float32"  # the type of all floating tensors of the engine
    batches = {"min": 1, "opt": profile.opt, "max": profile.maximum}
    inputs: list[tuple[str, str, Sequence[int]]] = [(INPUT, floating, run.loaded.data_config.get("input_size", ()))]
    if named is not None:
        inputs = [(each.name, floating if each.dtype == "float32" else each.dtype, each.shape) for each in named.each]
    outputs = [(each.name, floating, each.shape) for each in run.outputs]
    return {
        kind: [
            {"name": name, "dtype": dtype, **{which: [batch, *shape] for which, batch in batches.items()}}
            for name, dtype, shape in tensors
        ]
        for kind, tensors in (("inputs", inputs), ("outputs", outputs))
    }


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
    files = [name for name in FILES if name != MANIFEST]
    return {
        "model": run.model.name,
        "warnings": warnings(run),
        "servable": not run.loaded.random and run.acceptance.accepted,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": {
            name: {"sha256": file_sha256(run.folder / name), "bytes": os.path.getsize(run.folder / name)}
            for name in files
        },
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
        "engine": {
            "backend": run.built.backend,
            "version": run.built.version,
            "targets": list(run.built.targets),
            "settings": run.built.settings,
            "notes": list(run.built.notes),
            "audit": run.audit.to_json(),
            **run.execution.to_json(),
        },
        "acceptance": run.acceptance.to_json(),
        "task": run.task.name,
        "boxes": run.task.boxes and run.task.boxes.to_json(),
        "io": _io_json(run),
        "host": host.describe(),
        "commit": tool_commit(),
    }
