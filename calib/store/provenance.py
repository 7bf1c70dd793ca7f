"""What decides the last bits of a result beside its inputs: our code, libraries, instruction set, threads."""

import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
# What decodes the images and computes the network, beside our own code.
LIBRARIES = ("torch", "timm", "numpy", "pillow")


def code_sha256(*paths: Path) -> str:
    """Hex sha256 of the names and contents of Python files and of those below folders."""
    digest = hashlib.sha256()
    for path in paths:
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digest.update(f"{file.relative_to(path.parent)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def made_by(*code: Path) -> dict[str, Any]:
    """The code of `calib/` and of the paths `code`, and what else decides the last bits of a forward pass."""
    return {
        "code": code_sha256(ROOT / "calib", *code),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
