"""A new engine out of a finished package, on the machine that is to run it: `python -m deploy rebuild`. No torch.

A package holds the graphs that its engine was built from, so another version of TensorRT or another GPU needs neither the
network nor the calibration images. The integers, scales and golden images stay; the engine, its kernels and the proof are
new, and the engine is run on the golden images where it can run. What was measured on the evaluation images is of the graph,
which is the same.
"""

import shlex
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnx

from calib.errors import UserError, first_line
from calib.task import BOXES, CLASSIFIER, FEATURES, PICTURES, TOKENS, VALUES, Task, boxes_of
from deploy import host
from deploy.engine.audit import Audit, planned_attention, planned_layers
from deploy.engine.backends import choose_backend
from deploy.engine.build import Profile
from deploy.engine.builder import DEFAULT, Builder
from deploy.engine.isolated import build_apart
from deploy.errors import ContractError
from deploy.execution import executed_on_golden
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
    not_accepted,
    read_json,
    recover,
    staging,
    write_json,
)
from deploy.proven import proven
from deploy.report.evidence import engine_figures, tool_commit
from deploy.report.manifest import engine_json, files_json, io_json, replaced
from deploy.serve.shipped import Shipped, shipped_from_package
from deploy.verify import require_package, verify_package

# Axes of the one output that these tasks have, without that of the batch.
AXES = {CLASSIFIER: 1, FEATURES: 1, TOKENS: 2, PICTURES: 3}
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


def _dropped_limits(acceptance: Any) -> list[str]:
    """What is said of limits that the new engine was not measured by."""
    checks = acceptance.get("checks") if isinstance(acceptance, dict) else None
    return [
        f"{each.get('limit')} was measured with the engine before ({each.get('measured')}): not known of this one"
        for each in checks or []
        if str(each.get("limit")).startswith(SPEED_LIMIT)
    ]


def _task(manifest: dict[str, Any]) -> Task:
    """What the outputs are, as the manifest tells. Raises UserError if it tells something else than `make engine` writes."""
    outputs = {each["name"]: tuple(each["max"][1:]) for each in manifest["io"]["outputs"]}
    name, said = manifest["task"], manifest.get("boxes")
    fits = name in (BOXES, VALUES) or [len(shape) for shape in outputs.values()] == [AXES.get(name)]
    if not fits or (name == BOXES) != isinstance(said, dict):
        raise UserError(f"'{MANIFEST}' names the task {name!r}, which its outputs are not: build the package again")
    return Task(name, None if said is None else boxes_of(said, outputs, MANIFEST))


def _some_in_float(audit: Audit) -> str:
    return (
        f"warning: {len(audit.lost)} of {audit.planned} planned layers are not computed in integers on this processor"
    )


def _update(
    manifest: dict[str, Any], report: dict[str, Any], shipped: Shipped, engine: dict[str, Any], command: str
) -> None:
    """Put the new `engine` into the manifest, and into both what became of warnings and limits (edits both)."""
    before, acceptance = manifest["engine"], manifest.get("acceptance")
    happened = {
        "from": {key: before.get(key) for key in ("backend", "version", "targets")}, "manifest_sha256": shipped.id,
        "created": datetime.now(UTC).isoformat(timespec="seconds"), "machine": host.describe(), "commit": tool_commit(),
        "command": command,
    }  # fmt: skip
    told = f"{BUILT_AGAIN} {shipped.backend} {shipped.version}: accuracy is of its graph"
    limits = _kept_limits(acceptance)
    both = {
        "warnings": [*_warnings(manifest), told, *_dropped_limits(acceptance), *engine["notes"]],
        "acceptance": limits, "rebuilt": happened,
    }  # fmt: skip
    report |= both
    manifest |= {
        **both, "engine": engine, "engine_cache": None, "host": happened["machine"],
        **{key: happened[key] for key in ("created", "commit")},
        "servable": not shipped.random and limits["accepted"],
    }  # fmt: skip


def _tensors(manifest: dict[str, Any], kind: str) -> list[tuple[str, str, Sequence[int]]]:
    return [(each["name"], each["dtype"], each["max"][1:]) for each in manifest["io"][kind]]


@dataclass(frozen=True)
class _Before:
    """A package as it was when the build began: a copy, so that another run may replace it meanwhile."""

    folder: Path
    shipped: Shipped
    manifest: dict[str, Any]
    report: dict[str, Any]
    task: Task

    @classmethod
    def of(cls, package: Path, scratch: Path) -> "_Before":
        """A copy of `package` in `scratch`. Raises UserError unless it is whole and gives its golden outputs."""
        try:
            require_package(package)
            folder = Path(shutil.copytree(package, scratch / package.name))
            if wrong := verify_package(folder):
                raise UserError(
                    f"'{package}' is not sound ({'; '.join(wrong[:3])}): expected a package as make engine wrote it"
                )
            manifest, report = read_json(folder / MANIFEST), read_json(folder / REPORT)
            found = cls(folder, shipped_from_package(folder), manifest, report, _task(manifest))
        except (OSError, shutil.Error) as error:
            raise UserError(f"'{package}' cannot be read ({first_line(error, 200)}): expected a package") from error
        except UserError as error:
            raise UserError(str(error).replace(str(scratch / package.name), str(package))) from None
        if not isinstance(report.get("bytes"), dict):
            raise UserError(f"'{package / REPORT}' has no table 'bytes': expected the report of a package")
        return found

    def graph(self, name: str) -> onnx.ModelProto:
        """One of its graphs. Raises UserError for a file that is none."""
        try:
            return onnx.load(self.folder / name, load_external_data=False)
        except Exception as error:  # protobuf's own, of any origin
            raise UserError(f"{name} cannot be read ({first_line(error, 200)}): build the package again") from error


def _place(final: Path, accepted: bool) -> Path:
    """Where the package goes: one that does not keep its limits beside `final`, as `make engine` puts it."""
    beside = not_accepted(final)
    return final if accepted or final.name.endswith(beside.name.removeprefix(final.name)) else beside


def rebuild(package: Path, changes: Changes, to: Path | None = None) -> tuple[Path, list[str]]:
    """Build the engine of `package` again, there or in the folder `to`; returns (where it is, what to tell).

    Raises UserError for a package that is not sound or a target that cannot be built here, and ContractError if INT8 was
    lost or the engine does not reproduce the golden outputs; nothing is changed then.
    """
    package, final = package.resolve(), (to or package).resolve()
    if final != package and (final.is_relative_to(package) or package.is_relative_to(final)):
        raise UserError(f"'{final}' and the package '{package}' lie in each other: expected a folder beside it")
    recover(package)
    with tempfile.TemporaryDirectory() as scratch:
        before = _Before.of(package, Path(scratch))
        manifest, report, shipped = before.manifest, before.report, before.shipped
        backend, why = choose_backend(changes.target)
        backend.require_target(changes.sms, changes.builder)
        profile = Profile(changes.batch or shipped.opt, changes.max_batch or shipped.largest)
        graph, half = before.graph(MODEL if backend.FP16 else MODEL_FP32), manifest.get("floats") != FP32
        planned, attention = planned_layers(graph), planned_attention(graph)
        with staging(final, lambda: _place(final, manifest["acceptance"]["accepted"])) as fresh:
            built = build_apart(backend, graph, profile, changes.sms, changes.builder)
            audit = proven(built, planned, attention, final, backend.FP16, half)
            for name in STAY:
                shutil.copyfile(before.folder / name, fresh / name)
            (fresh / ENGINE).write_bytes(built.plan)
            write_json(fresh / LAYERS, built.layers_json())
            kernels = KernelLists(built.kernels, None, NO_TWIN)
            write_json(fresh / KERNELS, lists_to_json(kernels))
            execution = executed_on_golden(backend, built.plan, fresh, before.task)
            if reason := execution.golden_failure():
                raise ContractError(reason)
            dropped = _dropped_limits(manifest.get("acceptance"))
            engine, traffic = engine_json(built, audit, execution), kernels.traffic(profile.opt)
            _update(manifest, report, shipped, engine, changes.command(backend.NAME))
            report["bytes"][ENGINE] = len(built.plan)
            report["engine"] = engine_figures(built, audit, traffic, execution)
            write_json(fresh / REPORT, report)
            inputs, outputs = (_tensors(manifest, kind) for kind in ("inputs", "outputs"))
            manifest["io"] = io_json(inputs, outputs, backend.FP16 and half, profile)
            manifest["files"] = files_json(fresh)
            write_json(fresh / MANIFEST, manifest)
            instead = replaced(final, manifest) if final != package else ()
    place = _place(final, manifest["acceptance"]["accepted"])
    return place, [
        f"{backend.NAME} {built.version} ({why}), {len(built.plan) / 1e6:.1f} MB for {', '.join(built.targets)}",
        audit.summary(),
        *([_some_in_float(audit)] if audit.lost else []),
        f"engine {execution.golden_summary()}",
        *dropped,
        *built.notes,
        *instead,
        f"written to {place}",
    ]
