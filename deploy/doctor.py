"""`make doctor`: what this machine can do, what it lacks, and the command that installs it."""

import importlib.util
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from deploy import host
from deploy.engine.backends import PREFERENCE, backends
from deploy.gpu import NoGpuError, gpu

# Import name -> (purpose, whether every machine needs it, the command that installs it).
NEEDED = {
    "torch": ("calibration", True, "make setup"),
    "torchvision": ("timm", True, "make setup"),
    "timm": ("models", True, "make setup"),
    "onnx": ("export", True, "make setup"),
    "onnxscript": ("export", True, "make setup"),
    "onnxruntime": ("verification", True, "make setup"),
    "PIL": ("images", True, "make setup"),
    "skimage": ("sample images", True, "make setup"),
    "sklearn": ("sample images", True, "make setup"),
    "rich": ("tables", True, "make setup"),
    "polygraphy": ("debugging engines", False, "make setup"),
    "cuda.bindings": ("running engines", False, "make setup"),
    "pycuda": ("running engines through PyCUDA instead", False, "make setup-pycuda"),
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


def _installed(module: str) -> bool:
    """Whether a module, perhaps inside a package, can be found."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it lies in
        return False


def _gpu_line() -> str:
    """The GPU of this machine, or why there is none."""
    try:
        here = gpu()
    except NoGpuError as reason:
        return f"GPU: none ({reason})"
    driver = f", driver {here.driver}" if here.driver else ""
    return f"GPU: {here.name}, SM{here.compute_capability}, {here.memory / 1e9:.0f} GB, CUDA {here.cuda}{driver}"


def examine() -> Findings:
    """Examine the packages, backends, GPU and disk of this machine."""
    found = Findings()
    here = host.describe()
    found.lines.append(f"        {here['os']}, Python {here['python']}, {here['processor']}, {here['cores']} cores")
    found.lines.append(f"        {_gpu_line()}")
    for module, (purpose, required, remedy) in NEEDED.items():
        found.add(_installed(module), f"{module} ({purpose})", remedy, required)
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
