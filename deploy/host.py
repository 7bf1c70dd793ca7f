"""A description of this machine: GPU, driver, processor, packages."""

import ctypes
import gc
import importlib.metadata
import os
import platform
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

from calib.errors import UserError
from deploy.gpu import NoGpuError, gpu

PACKAGES = (
    "torch", "torchvision", "timm", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "polygraphy", "tensorrt",
    "tensorrt-cu12", "tensorrt-rtx", "cuda-bindings", "pycuda", "numpy", "pillow",
)  # fmt: skip


INT8_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


LEAST_ADDRESS_SPACE = (
    5_000_000_000  # bytes: with 4e9 the libraries do not load or abort, with 5e9 a small network builds
)


MUCH_MEMORY = 2_500_000_000  # bytes in use, above which what a stage left is looked for


def require_address_space() -> None:
    """Raise UserError if `ulimit -v` leaves less than torch, ONNX Runtime and a builder need to load: they would abort."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < LEAST_ADDRESS_SPACE:
        raise UserError(
            f"this shell allows {limit / 1e9:.1f} GB of address space: expected {LEAST_ADDRESS_SPACE / 1e9:.0f} GB or more; "
            f"raise it with ulimit -v"
        )


M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # glibc's numbers of what `mallopt` sets, in bytes


def reuse_memory() -> None:
    """Let new tensors take the memory of freed ones, most of which stays in the process until `return_memory`.

    glibc asks the system for every block above 32 MB and gives it back when it is freed. The system has to clear it each
    time: a quarter of the time of a MobileNet's calibration. Where the environment sets up glibc's allocation
    (MALLOC_MMAP_THRESHOLD_, or glibc.malloc in GLIBC_TUNABLES), and where glibc refuses the first number, as versions
    before 2.35 do, nothing is set.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    with suppress(OSError, AttributeError):  # another C library or system
        library = ctypes.CDLL("libc.so.6")
        if library.mallopt(M_MMAP_THRESHOLD, 1 << 30):
            library.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def return_memory() -> None:
    """Give the memory that nothing uses back to the system: glibc keeps most of what large tensors leave."""
    with suppress(OSError, AttributeError):  # another C library or system
        trim = ctypes.CDLL("libc.so.6").malloc_trim
        trim(0)
        if int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() > MUCH_MEMORY:
            gc.collect()  # networks with hooks refer to themselves; it takes 0.2 s
            trim(0)


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


def _gpu_facts() -> dict[str, Any]:
    """What is known of the GPU; without one, its name and driver are None."""
    try:
        here = gpu()
    except NoGpuError:
        return {"gpu": None, "driver": None}
    facts = {"compute_capability": here.compute_capability, "gpu_memory": here.memory, "cuda": here.cuda}
    return {"gpu": here.name, "driver": here.driver, **facts}


def describe() -> dict[str, Any]:
    """All of the above, for manifest and report."""
    return {
        "os": platform.platform(),
        "python": platform.python_version(),
        "processor": processor(),
        "int8_instructions": list(int8_instructions()),
        "cores": len(os.sched_getaffinity(0)),
        **_gpu_facts(),
        "packages": {name: found for name in PACKAGES if (found := package_version(name))},
    }
