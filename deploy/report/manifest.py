"""manifest.json: provenance, what a loader must compare before it trusts the engine."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from calib.store.digests import file_sha256
from deploy import host
from deploy.package import FILES, MANIFEST
from deploy.report.evidence import Evidence, images_json, tool_commit


def manifest_json(evidence: Evidence, folder: Path) -> dict[str, Any]:
    """Provenance: what a loader must compare before it trusts the engine."""
    files = [name for name in FILES if name != MANIFEST]
    return {
        "model": evidence.model.name,
        "warnings": evidence.warnings(),
        "servable": not evidence.loaded.random,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": {
            name: {"sha256": file_sha256(folder / name), "bytes": os.path.getsize(folder / name)} for name in files
        },
        "weights": {
            "source": evidence.loaded.source,
            "sha256": evidence.loaded.sha256,
            "random": evidence.loaded.random,
        },
        "calibration": images_json(evidence.calibration),
        "preprocessing": evidence.calibration.preprocessing.to_json(),
        "recipe": evidence.recipe.to_json(),
        "calibration_cache": evidence.cache_key,
        "planned_int8_layers": list(evidence.planned),
        "engine": {
            "backend": evidence.built.backend,
            "version": evidence.built.version,
            "targets": list(evidence.built.targets),
            "settings": evidence.built.settings,
            "audit": evidence.audit.to_json(),
        },
        "io": {"input": "FP16 (batch, 3, height, width), normalised", "output": "FP16 (batch, outputs)"},
        "host": host.describe(),
        "commit": tool_commit(),
    }
