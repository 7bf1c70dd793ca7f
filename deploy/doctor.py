"""`make doctor`: what this machine can do, what it lacks, and the command that installs it."""

import importlib.util
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from deploy import host
from deploy.engine.backends import PREFERENCE, backends

# Import name -> (purpose, whether every machine needs it).
NEEDED = {
    "torch": ("calibration", True),
    "torchvision": ("timm", True),
    "timm": ("models", True),
    "onnx": ("export", True),
    "onnxscript": ("export", True),
    "onnxruntime": ("verification", True),
    "PIL": ("images", True),
    "skimage": ("sample images", True),
    "sklearn": ("sample images", True),
    "rich": ("tables", True),
    "polygraphy": ("debugging engines", False),
    "pycuda": ("running engines", False),
}
SMALLEST_FREE_GB = 2.0


@dataclass
class Findings:
    """The lines to print. `healthy` is False if `make engine` cannot work on this machine."""

    lines: list[str] = field(default_factory=list)
    healthy: bool = True

    def add(self, good: bool, text: str, remedy: str = "", required: bool = True) -> None:
        """Add a line: ok, MISSING (required) or absent (optional), with the command that helps."""
        mark = "ok      " if good else ("MISSING " if required else "absent  ")
        self.lines.append(f"{mark}{text}" + (f"  ->  {remedy}" if remedy and not good else ""))
        self.healthy &= good or not required


def examine() -> Findings:
    """Examine the packages, backends, GPU and disk of this machine."""
    found = Findings()
    here = host.describe()
    found.lines.append(f"        {here['os']}, Python {here['python']}, {here['processor']}, {here['cores']} cores")
    gpu = here["gpu"]
    found.lines.append(f"        GPU: {gpu or 'none'}" + (f", driver {here['driver']}" if gpu else ""))
    for module, (purpose, required) in NEEDED.items():
        present = importlib.util.find_spec(module) is not None
        found.add(present, f"{module} ({purpose})", "make setup", required)
    known = backends()
    reasons = {name: known[name].cannot_build() for name in PREFERENCE}
    for name, reason in reasons.items():
        able = f"{name}: builds engines here" if reason is None else f"{name}: cannot build: {reason}"
        found.add(reason is None, able, required=False)
        cannot_run = known[name].cannot_run()
        runs = f"{name}: runs engines here" if cannot_run is None else f"{name}: cannot run: {cannot_run}"
        found.add(cannot_run is None, runs, required=False)
    found.add(not all(reasons.values()), "at least one backend can build", "make setup")
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    found.add(free >= SMALLEST_FREE_GB, f"{free:.0f} GB free here", f"free {SMALLEST_FREE_GB:.0f} GB")
    return found
