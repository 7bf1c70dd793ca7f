"""A new engine out of a finished package, on the machine that is to run it: `python -m deploy rebuild`. No torch.

A package holds the graphs that its engine was built from, so another version of TensorRT or another GPU needs neither the
network nor the calibration images. The integers, scales and golden images stay; the engine, its kernels and the proof are
new, and the engine is run on the golden images where it can run. What was measured on the evaluation images is of the graph,
which is the same.
"""

import shlex
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnx

from calib.errors import UserError
from calib.store.digests import file_sha256
from calib.task import Task, boxes_of
from deploy import host
from deploy.engine.audit import Audit, planned_attention, planned_layers
from deploy.engine.backends import Built, choose_backend
from deploy.engine.build import Profile
from deploy.engine.builder import DEFAULT, Builder
from deploy.engine.isolated import build_apart
from deploy.errors import ContractError
from deploy.execution import Execution, executed_on_golden
from deploy.explain.kernel_list import KernelLists, lists_to_json
from deploy.package import (
    ENGINE,
    GOLDEN,
    KERNELS,
    LAYERS,
    MANIFEST,
    MODEL,
    MODEL_FP32,
    REPORT,
    read_json,
    staging,
    write_json,
)
from deploy.proven import proven
from deploy.report.evidence import tool_commit
from deploy.serve.shipped import Shipped, shipped_from_package
from deploy.verify import file_faults

STAY = (MODEL, MODEL_FP32, GOLDEN)  # files of a package that do not depend on the engine
NO_TWIN = "the engine was built again from a package, which does not hold the float network"
BUILT_AGAIN = "engine built again from a package of"
FP32 = "fp32"  # types of model.onnx beside its integers, where they are not FP16
SPEED_LIMIT = "MIN_SPEEDUP"  # was measured with another engine


@dataclass(frozen=True)
class Changes:
    """What the engine is to be built for. `batch`, `max_batch`: None for those of the package."""

    target: str = "auto"
    sms: tuple[int, ...] | None = None
    builder: Builder = DEFAULT
    batch: int | None = None
    max_batch: int | None = None

    def command(self, backend: str) -> str:
        """The command that builds the engine again; PACKAGE is the one that it was built from."""
        given = {
            "target": backend, "sm": ",".join(map(str, self.sms or ())), "builder": str(self.builder), "batch": self.batch,
            "max-batch": self.max_batch,
        }  # fmt: skip
        options = [part for name, value in given.items() if value for part in (f"--{name}", str(value))]
        return shlex.join(["python", "-m", "deploy", "rebuild", "PACKAGE", *options])


def _texts(found: Any) -> list[str]:
    """The texts of a list that comes out of a file."""
    return [each for each in found if isinstance(each, str)] if isinstance(found, list) else []


def _warnings(manifest: dict[str, Any]) -> list[str]:
    """What is still to be said of a package when its engine goes."""
    of_engine = _texts(manifest["engine"].get("notes"))
    return [each for each in _texts(manifest.get("warnings")) if each not in of_engine and BUILT_AGAIN not in each]


def _kept_limits(acceptance: Any) -> dict[str, Any]:
    """The limits on accuracy, which are of the graph."""
    checks = acceptance.get("checks") if isinstance(acceptance, dict) else None
    kept = [each for each in checks or [] if not str(each.get("limit")).startswith(SPEED_LIMIT)]
    return {"accepted": all(each.get("kept") is True for each in kept), "checks": kept}


def _task(manifest: dict[str, Any]) -> Task:
    """What the outputs are, as the manifest tells. Raises UserError if it tells something else than `make engine` writes."""
    outputs = {each["name"]: tuple(each["max"][1:]) for each in manifest["io"]["outputs"]}
    said = manifest.get("boxes")
    return Task(manifest["task"], None if said is None else boxes_of(said, outputs, MANIFEST))


def _typed(io: dict[str, Any], half: bool, profile: Profile) -> dict[str, Any]:
    """Inputs and outputs of an engine with these floating types and batches."""
    floating, batches = "float16" if half else "float32", {"min": 1, "opt": profile.opt, "max": profile.maximum}
    return {
        kind: [
            {
                **each, "dtype": floating if each["dtype"].startswith("float") else each["dtype"],
                **{which: [batch, *each[which][1:]] for which, batch in batches.items()},
            }
            for each in io[kind]
        ]
        for kind in ("inputs", "outputs")
    }  # fmt: skip


def _engine_json(built: Built, audit: dict[str, Any], execution: Execution) -> dict[str, Any]:
    return {
        "backend": built.backend, "version": built.version, "targets": list(built.targets), "settings": built.settings,
        "notes": list(built.notes), "audit": audit, **execution.to_json(),
    }  # fmt: skip


def _some_in_float(audit: Audit) -> str:
    return (
        f"warning: {len(audit.lost)} of {audit.planned} planned layers are not computed in integers on this processor"
    )


def _write_evidence(
    fresh: Path,
    shipped: Shipped,
    manifest: dict[str, Any],
    report: dict[str, Any],
    engine: dict[str, Any],
    traffic: Any,
    command: str,
) -> None:
    """Put the new `engine` into manifest and report (edits both), and write the report to `fresh`."""
    before = manifest["engine"]
    created = datetime.now(UTC).isoformat(timespec="seconds")
    happened = {
        "from": {key: before.get(key) for key in ("backend", "version", "targets")}, "manifest_sha256": shipped.id,
        "created": created, "machine": host.describe(), "commit": tool_commit(), "command": command,
    }  # fmt: skip
    told = f"{BUILT_AGAIN} {shipped.backend} {shipped.version}: accuracy is of its graph"
    warnings = [*_warnings(manifest), told, *engine["notes"]]
    limits = _kept_limits(manifest.get("acceptance"))
    both = {"warnings": warnings, "acceptance": limits, "rebuilt": happened}
    size = (fresh / ENGINE).stat().st_size
    shown = {key: value for key, value in engine.items() if key not in ("audit", "settings", "notes")}
    shown |= {"bytes": size, **engine["audit"], "traffic": traffic}
    without = {"kernels_without_branches": None, "bytes_without_branches": None}
    report |= {**both, "bytes": {**report["bytes"], ENGINE: size}, "engine": shown | without}
    write_json(fresh / REPORT, report)
    manifest |= {
        **both, "engine": engine, "engine_cache": None, "created": created, "commit": happened["commit"],
        "host": happened["machine"], "servable": not shipped.random and limits["accepted"],
    }  # fmt: skip


def rebuild(folder: Path, changes: Changes, to: Path | None = None) -> list[str]:
    """Build the engine of the package in `folder` again, there or in the folder `to`; returns what to tell.

    Raises UserError for a package that is not whole or a target that cannot be built here, and ContractError if INT8 was
    lost or the engine does not reproduce the golden outputs; nothing is changed then.
    """
    if to and to.resolve().is_relative_to(folder.resolve()) and to.resolve() != folder.resolve():
        raise UserError(f"'{to}' lies inside the package '{folder}': expected a folder beside it")
    if wrong := file_faults(folder):
        raise UserError(f"'{folder}' is not whole ({'; '.join(wrong[:3])}): expected a package as make engine wrote it")
    shipped, final = shipped_from_package(folder), to or folder
    manifest, report = read_json(folder / MANIFEST), read_json(folder / REPORT)
    task = _task(manifest)
    backend, why = choose_backend(changes.target)
    backend.require_target(changes.sms, changes.builder)
    profile = Profile(changes.batch or shipped.opt, changes.max_batch or shipped.largest)
    graph, half = onnx.load(folder / (MODEL if backend.FP16 else MODEL_FP32)), manifest.get("floats") != FP32
    planned, attention = planned_layers(graph), planned_attention(graph)
    built = build_apart(backend, graph, profile, changes.sms, changes.builder)
    audit = proven(built, planned, attention, final, backend.FP16, half)
    kernels = KernelLists(built.kernels, None, NO_TWIN)
    with staging(final) as fresh:
        for name in STAY:
            shutil.copyfile(folder / name, fresh / name)
        (fresh / ENGINE).write_bytes(built.plan)
        write_json(fresh / LAYERS, built.layers_json())
        write_json(fresh / KERNELS, lists_to_json(kernels))
        execution = executed_on_golden(backend, built.plan, fresh, task)
        if reason := execution.golden_failure():
            raise ContractError(reason)
        engine = _engine_json(built, audit.to_json(), execution)
        _write_evidence(
            fresh, shipped, manifest, report, engine, kernels.traffic(profile.opt), changes.command(backend.NAME)
        )
        manifest["io"] = _typed(manifest["io"], backend.FP16 and half, profile)
        files = [name for name in manifest["files"] if name != MANIFEST]
        manifest["files"] = {
            name: {"sha256": file_sha256(fresh / name), "bytes": (fresh / name).stat().st_size} for name in files
        }
        write_json(fresh / MANIFEST, manifest)
    return [
        f"{backend.NAME} {built.version} ({why}), {len(built.plan) / 1e6:.1f} MB for {', '.join(built.targets)}",
        audit.summary(),
        *([_some_in_float(audit)] if audit.lost else []),
        f"engine {execution.golden_summary()}",
        *built.notes,
        f"written to {final}",
    ]
