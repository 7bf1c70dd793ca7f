"""Engines that were built, kept under all that decides a build: the same graph is not built again.

A file is named after the sha256 of the graph, the batch profile, the backend with its version and what it depends on in
this machine, and the code that builds. Any difference is another name, so a file is never out of date, only unused. Proofs
are not kept: every run audits and verifies the engine anew.
"""

import contextlib
import hashlib
import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch

from calib.store.checkpoint import UnusableError, read_state, write_state
from calib.store.provenance import ROOT, code_sha256
from calib.store.user_cache import trim
from deploy.engine.backends import Built
from deploy.engine.builder import Wanted
from deploy.engine.isolated import build_apart
from deploy.engine.kernels import Kernel, KernelTensor

if TYPE_CHECKING:
    import onnx

FOLDER = "engines"  # in the user's cache
CODE = (ROOT / "deploy/engine", ROOT / "deploy/graph", ROOT / "deploy/measure", Path(__file__))
MOST_BYTES = 5_000_000_000  # of all engines; those that were used longest ago go first
CLASSES = (Kernel, KernelTensor)  # beside plain values a file may hold these and nothing else


class KeptEngines:
    """The engines in `folder`; None: none is read or written."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.code = code_sha256(*CODE)

    def key(self, backend: ModuleType, graph: bytes, wanted: Wanted) -> str:
        """Return the sha256 of all that decides the engine of the serialized ONNX `graph`."""
        decided_by = {
            "graph": hashlib.sha256(graph).hexdigest(), "wanted": asdict(wanted), "backend": backend.NAME,
            "version": backend.version(), "machine": backend.depends_on(), "code": self.code,
        }  # fmt: skip
        return hashlib.sha256(json.dumps(decided_by, sort_keys=True).encode()).hexdigest()

    def built(
        self, backend: ModuleType, model: "onnx.ModelProto", wanted: Wanted, anew: bool
    ) -> tuple[Built, str, tuple[str, ...]]:
        """Return (the engine of `model`, its key if it was kept, what to tell the user); `anew`: it is built in any case.

        Raises UserError where building fails. A place that cannot be written is no error.
        """
        if self.folder is None:
            return build_apart(backend, model, wanted.profile, wanted.sms, wanted.builder), "", ()
        key = self.key(backend, model.SerializeToString(deterministic=True), wanted)
        path, said = self.folder / f"{backend.NAME}.{key}.pt", []
        if path.exists() and not anew:
            try:
                return _read(path, key), key, (f"taken from cache {key[:12]}",)
            except UnusableError as reason:
                said.append(f"{path} is {reason}: not used")
        found = build_apart(backend, model, wanted.profile, wanted.sms, wanted.builder)
        try:
            plan = torch.from_numpy(np.frombuffer(found.plan, np.uint8).copy())
            told = {each.name: getattr(found, each.name) for each in fields(found) if each.name != "plan"}
            write_state(path, {"key": key, "plan": plan, "told": told})
            trim(self.folder, MOST_BYTES)
        except OSError as error:
            said.append(f"not kept: {self.folder} cannot be written ({error.strerror})")
        return found, "", tuple(said)


def _read(path: Path, key: str) -> Built:
    """Return the engine kept at `path`. Raises UnusableError."""
    state = read_state(path, CLASSES)
    if state.get("key") != key:
        raise UnusableError("made from other inputs than its name says")
    with contextlib.suppress(OSError):  # of another user, say
        os.utime(path)
    try:
        return Built(state["plan"].numpy().tobytes(), **state["told"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UnusableError("no engine of this tool") from error
