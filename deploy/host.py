"""A description of this machine: GPU, driver, processor, packages."""

import functools
import importlib.metadata
import os
import platform
import resource
import subprocess
from typing import Any

from calib.errors import UserError

PACKAGES = (
    "torch", "torchvision", "timm", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "polygraphy",
    "tensorrt", "tensorrt-rtx", "pycuda", "numpy", "pillow",
)  # fmt: skip


INT8_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


LEAST_ADDRESS_SPACE = (
    5_000_000_000  # bytes: with 4e9 the libraries do not load or abort, with 5e9 a small network builds
)


def require_address_space() -> None:
    """Raise UserError if `ulimit -v` leaves less than torch, ONNX Runtime and a builder need to load: they would abort."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < LEAST_ADDRESS_SPACE:
        raise UserError(
            f"this shell allows {limit / 1e9:.1f} GB of address space: expected {LEAST_ADDRESS_SPACE / 1e9:.0f} GB or more; "
            f"raise it with ulimit -v"
        )


@functools.cache
def _nvidia_smi(field: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def gpu_name() -> str | None:
    """The name of the first NVIDIA GPU, None without a driver."""
    return _nvidia_smi("name")


def gpu_compute_capability() -> int | None:
    """The compute capability of the first GPU as a number (8.9 -> 89), None without a driver."""
    text = _nvidia_smi("compute_cap")
    return None if text is None else int(text.replace(".", ""))


def driver_version() -> str | None:
    """The version of the NVIDIA driver, None without one."""
    return _nvidia_smi("driver_version")


def gpu_free_mb() -> int | None:
    """The free memory of the first GPU in 2^20 bytes, None without a driver."""
    text = _nvidia_smi("memory.free")
    return None if text is None or not text.split()[0].isdigit() else int(text.split()[0])


def package_version(name: str) -> str | None:
    """The version of an installed package, None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpuinfo(*keys: str) -> str | None:
    """The first entry of /proc/cpuinfo with one of these names, None if there is none."""
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.split(":", 1)[0].strip() in keys)
    except (OSError, StopIteration):
        return None


def processor() -> str:
    """The model name of the processor."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def int8_instructions() -> tuple[str, ...]:
    """The instructions for sums of INT8 products that the processor has, by their names in the Linux kernel.

    Without any, INT8 products take as long as float ones.
    """
    flags = (_cpuinfo("flags", "Features") or "").split()
    return tuple(name for name in INT8_INSTRUCTIONS if name in flags)


def describe() -> dict[str, Any]:
    """All of the above, for manifest and report."""
    return {
        "os": platform.platform(),
        "python": platform.python_version(),
        "processor": processor(),
        "int8_instructions": list(int8_instructions()),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": gpu_name(),
        "driver": driver_version(),
        "packages": {name: found for name in PACKAGES if (found := package_version(name))},
    }
