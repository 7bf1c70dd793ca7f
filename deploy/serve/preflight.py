"""Whether a package may be served, and whether this machine can: asked before anything loads it, in under a second.

An engine is never deserialized here. What is compared: digests, what the manifest says of the package, the versions and the
GPU it was built for, and the header of a TensorRT-RTX engine where that library is installed.
"""

import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path

from deploy.engine.architectures import rtx_supports, runs_on
from deploy.engine.backends import ONNXRUNTIME, TENSORRT, TENSORRT_RTX
from deploy.engine.logger import keeping_logger
from deploy.gpu import NoGpuError, gpu
from deploy.package import ENGINE
from deploy.serve.containers import same_release
from deploy.serve.shipped import Shipped, shipped_from_package
from deploy.verify import file_faults

MB = 1 << 20
REBUILD = "python -m deploy rebuild"  # deploy/serve/rebuild.py
# What TensorRT-RTX finds in the header of an engine (EngineInvalidityDiagnostics), bit by bit.
HEADER_FAULTS = {
    1: "was built by another version of TensorRT-RTX",
    2: "was not built for this GPU architecture",
    4: "needs a newer driver",
    8: "needs a newer CUDA runtime",
    16: "needs more GPU memory",
    32: "is no engine of TensorRT-RTX, or a damaged one",
}


@dataclass(frozen=True)
class Allowed:
    """What the user takes on knowingly, although it is not for production."""

    random_weights: bool = False
    sample_calibration: bool = False
    unexecuted: bool = False


@dataclass(frozen=True)
class Machine:
    """What the server's machine has. `sm`, `driver` and `gpu_mb` (2^20 bytes) are None without a usable GPU.

    `free_disk`: bytes where the model repository lies. `tensorrt`: version in the server's container, None: not asked.
    """

    sm: int | None
    driver: str | None
    gpu_mb: int | None
    free_disk: int
    tensorrt: str | None = None


def this_machine(repository: Path, tensorrt: str | None = None) -> Machine:
    """The machine this runs on; `repository` need not exist yet."""
    there = next(each for each in (repository.absolute(), *repository.absolute().parents) if each.exists())
    disk = shutil.disk_usage(there).free
    try:
        here = gpu()
    except NoGpuError:
        return Machine(None, None, None, disk, tensorrt)
    return Machine(here.compute_capability, here.driver, here.memory // MB, disk, tensorrt)


def promise_faults(shipped: Shipped, allowed: Allowed, cpu: bool) -> list[str]:
    """One sentence for each reason not to serve the package anywhere. `cpu`: the engine will not be used."""
    wrong = []
    wrong += [f"it does not keep the limits that it was built for: {each}" for each in shipped.failed]
    if shipped.random and not allowed.random_weights:
        wrong.append(
            "its weights are random: build with real weights, or give --allow-random-weights (ALLOW=random-weights) to "
            "measure latency"
        )
    if shipped.sample and not allowed.sample_calibration:
        wrong.append(
            "it was calibrated on the built-in sample images: build with CALIB=<folder of your images>, or give "
            "--allow-sample-calibration (ALLOW=sample-calibration)"
        )
    if not (cpu or shipped.executed or allowed.unexecuted):
        wrong.append(
            f"{ENGINE} was never run, so nothing is known of its outputs: build it where its GPU is ({REBUILD}), serve "
            f"the graph alone (--cpu), or give --allow-unexecuted"
        )
    return wrong


def _older(one: str, other: str) -> bool:
    return [int(part) for part in one.split(".")] < [int(part) for part in other.split(".")]


def machine_faults(shipped: Shipped, machine: Machine) -> list[str]:
    """One sentence for each reason why the engine cannot run on `machine`."""
    wrong = []
    if machine.tensorrt is not None and shipped.backend != TENSORRT:
        wrong.append(
            f"{ENGINE} is of {shipped.backend}: expected {TENSORRT}, which alone Triton loads ({REBUILD} --target tensorrt)"
        )
    elif machine.tensorrt is not None and not same_release(shipped.version, machine.tensorrt):
        wrong.append(
            f"{ENGINE} was built by TensorRT {shipped.version}, the server holds {machine.tensorrt}: expected the same "
            f"release; build with tensorrt=={machine.tensorrt} ({REBUILD}), or choose another container"
        )
    if shipped.backend == ONNXRUNTIME:  # runs on any CPU
        return wrong
    if machine.sm is None:
        return [
            *wrong,
            f"no usable NVIDIA GPU here: expected a GPU for {ENGINE}; give --cpu to serve the graph alone",
        ]
    if shipped.backend == TENSORRT_RTX and not rtx_supports(machine.sm):
        wrong.append(
            f"{ENGINE} is of TensorRT-RTX, which does not support this GPU, SM{machine.sm}: build it here "
            f"({REBUILD} --target tensorrt)"
        )
    elif not any(runs_on(target, machine.sm) for target in shipped.targets):
        wrong.append(
            f"{ENGINE} is for {', '.join(shipped.targets)}, this GPU is SM{machine.sm}: "
            f"build it for SM={machine.sm} ({REBUILD})"
        )
    if shipped.driver and machine.driver and _older(machine.driver, shipped.driver):
        wrong.append(
            f"driver {machine.driver} is older than {shipped.driver}, which the engine was built with: update it"
        )
    if machine.gpu_mb is not None and machine.gpu_mb * MB < shipped.engine_bytes:
        wrong.append(
            f"the GPU has {machine.gpu_mb} MB, {ENGINE} alone has {shipped.engine_bytes // MB} MB: take a larger one"
        )
    return wrong


def disk_faults(shipped: Shipped, machine: Machine) -> list[str]:
    """A sentence if the package does not fit where the repository lies."""
    if machine.free_disk >= shipped.bytes:
        return []
    return [
        f"the package has {shipped.bytes // MB} MB, the repository's disk {machine.free_disk // MB} MB free: free some"
    ]


def header_faults(diagnostics: int) -> list[str]:
    """One sentence for each bit that TensorRT-RTX sets on the header of an engine."""
    return [f"{ENGINE} {what} (its header says so)" for bit, what in HEADER_FAULTS.items() if diagnostics & bit]


def rtx_diagnostics(plan: bytes) -> int:
    """The bits that TensorRT-RTX sets on the header of `plan`; 0 without the library. Nothing is deserialized."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        return 0
    import tensorrt_rtx as trt

    _, diagnostics = trt.Runtime(keeping_logger(trt)).get_engine_validity(plan)  # what it would print is in the bits
    return int(diagnostics)


def preflight(folder: Path, machine: Machine, allowed: Allowed, cpu: bool) -> list[str]:
    """One sentence for each reason why the package at `folder` must or can not be served on `machine`.

    `cpu`: only the graph for ONNX Runtime is served. Raises UserError if the manifest is not one of a package.
    """
    shipped = shipped_from_package(folder)
    wrong = [*file_faults(folder), *promise_faults(shipped, allowed, cpu), *disk_faults(shipped, machine)]
    if cpu:
        return wrong
    wrong += machine_faults(shipped, machine)
    if shipped.backend == TENSORRT_RTX and (folder / ENGINE).is_file():
        wrong += header_faults(rtx_diagnostics((folder / ENGINE).read_bytes()))
    return wrong
