"""manifest.json: provenance, what a loader must compare before it trusts the engine."""

import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from calib.store.digests import file_sha256
from deploy import host
from deploy.package import FILES, MANIFEST
from deploy.report.evidence import images_json, tool_commit, warnings

if TYPE_CHECKING:
    from deploy.run import Run


def manifest_json(run: "Run") -> dict[str, Any]:
    """Provenance: what a loader must compare before it trusts the engine."""
    files = [name for name in FILES if name != MANIFEST]
    return {
        "model": run.model.name,
        "warnings": warnings(run),
        "servable": not run.loaded.random,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": {
            name: {"sha256": file_sha256(run.folder / name), "bytes": os.path.getsize(run.folder / name)}
            for name in files
        },
        "weights": {
            "source": run.loaded.source,
            "sha256": run.loaded.sha256,
            "random": run.loaded.random,
            "module": run.loaded.module,
        },
        "calibration": images_json(run.calibration),
        "preprocessing": run.calibration.preprocessing.to_json(),
        "recipe": run.recipe.to_json(),
        "calibration_cache": run.taken.get("calibrate"),
        "planned_int8_layers": list(run.planned),
        "engine": {
            "backend": run.built.backend,
            "version": run.built.version,
            "targets": list(run.built.targets),
            "settings": run.built.settings,
            "audit": run.audit.to_json(),
        },
        "io": {"input": "FP16 (batch, 3, height, width), normalised", "output": "FP16 (batch, outputs)"},
        "host": host.describe(),
        "commit": tool_commit(),
    }
