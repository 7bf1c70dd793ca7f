"""Engine builders: one file per backend, each with `NAME` and the functions `cannot_build`, `cannot_run`, `require_target`,
`version`, `depends_on`, `build`, `runner` and `device_name`. `FP16`: whether its engines have FP16 types, or FP32 beside the
integers.
"""

import importlib
import pkgutil
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from calib.errors import UserError, suggestion
from deploy.engine.kernels import Kernel

TENSORRT, TENSORRT_RTX, ONNXRUNTIME = "tensorrt", "tensorrt_rtx", "onnxruntime"
PREFERENCE = (TENSORRT, TENSORRT_RTX, ONNXRUNTIME)  # the order in which TARGET=auto tries them


@dataclass(frozen=True)
class Built:
    """A serialized engine, and what is known about it without running it.

    `plan`: the serialized engine. `targets`: GPU architectures it runs on. `kernels`: what it launches. `layers`: what it
    tells of itself in its own words, as JSON. `settings`: all that determined the build. `notes`: sentences that the user
    has to read.
    """

    plan: bytes
    backend: str
    version: str
    targets: tuple[str, ...]
    kernels: tuple[Kernel, ...]
    layers: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def layers_json(self) -> dict[str, Any]:
        """`layers` and whose they are, as plain values."""
        return {"backend": self.backend, "version": self.version, "targets": list(self.targets), **self.layers}


def backends() -> dict[str, ModuleType]:
    """All backends in this folder by name."""
    found = (importlib.import_module(f"{__name__}.{item.name}") for item in pkgutil.iter_modules(__path__))
    return {module.NAME: module for module in found}


def choose_backend(target: str) -> tuple[ModuleType, str]:
    """(backend, reason for the choice). `target` is the name of a backend, or `auto`.

    Raises UserError for an unknown name, or if no engine can be built on this machine.
    """
    known = backends()
    if target != "auto":
        if target not in known:
            raise UserError(
                f"unknown TARGET '{target}': expected auto, {', '.join(sorted(known))}."
                f"{suggestion(target, [*known, 'auto'])}"
            )
        if reason := known[target].cannot_build():
            raise UserError(f"TARGET={target} cannot build here: {reason}")
        return known[target], "asked for"
    reasons = {name: known[name].cannot_build() for name in PREFERENCE}
    for name, reason in reasons.items():
        if reason is None:
            refused = "; ".join(f"{other}, {why}" for other, why in reasons.items() if why)
            return known[name], f"not {refused}" if refused else "preferred"
    raise UserError("no backend can build here: " + "; ".join(f"{name}: {why}" for name, why in reasons.items()))
