"""The GPU that engines are built for and run on: the first one that CUDA_VISIBLE_DEVICES leaves visible.

It is asked through CUDA's driver API, which drivers for CUDA 12 and 13 both have, so it is the device that TensorRT uses.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

KERNEL_MODULE = Path("/sys/module/nvidia/version")
NAME_LENGTH = 256  # most bytes of a device's name


class CudaError(RuntimeError):
    """A call of CUDA failed; the message is the name of the call and of the error."""


class NoGpuError(Exception):
    """There is no usable GPU here; the message is the reason."""


@dataclass(frozen=True)
class Gpu:
    """`compute_capability`: 89 for 8.9. `memory`: bytes. `cuda`: the newest CUDA that the driver runs, such as "13.0".

    `driver`: version of the driver, None where the system does not tell it.
    """

    name: str
    compute_capability: int
    memory: int
    cuda: str
    driver: str | None


def answer(driver: ModuleType, call: str, *arguments: Any) -> Any:
    """What the function `call` of CUDA's driver API returns: None, a value or a tuple. Raises CudaError."""
    error, *values = getattr(driver, call)(*arguments)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise CudaError(f"{call}: {error.name}")
    return values[0] if len(values) == 1 else tuple(values) or None


def started_driver() -> ModuleType:
    """`cuda.bindings.driver`, initialised, with one visible GPU or more. Raises NoGpuError with the reason."""
    try:
        from cuda.bindings import driver
    except ImportError:
        raise NoGpuError("the package cuda-bindings is not installed") from None
    try:
        answer(driver, "cuInit", 0)
        count = answer(driver, "cuDeviceGetCount")
    except CudaError as error:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        shown = "" if visible is None else f", with CUDA_VISIBLE_DEVICES='{visible}'"
        raise NoGpuError(f"the NVIDIA driver finds no usable GPU ({error}{shown})") from None
    except RuntimeError:  # what cuda-bindings raises where libcuda.so.1 cannot be loaded
        raise NoGpuError("no NVIDIA driver") from None
    if not count:
        raise NoGpuError("the NVIDIA driver finds no GPU")
    return driver


def _kernel_module() -> str | None:
    try:
        return KERNEL_MODULE.read_text().strip()
    except OSError:
        return None


def gpu() -> Gpu:
    """The GPU of this machine. Raises NoGpuError with the reason why there is none."""
    driver = started_driver()
    attribute, device = driver.CUdevice_attribute, answer(driver, "cuDeviceGet", 0)
    major, minor = (
        answer(driver, "cuDeviceGetAttribute", which, device)
        for which in (
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    cuda = answer(driver, "cuDriverGetVersion")
    return Gpu(
        name=answer(driver, "cuDeviceGetName", NAME_LENGTH, device).split(b"\0")[0].decode(errors="replace"),
        compute_capability=10 * major + minor,
        memory=answer(driver, "cuDeviceTotalMem", device),
        cuda=f"{cuda // 1000}.{cuda % 1000 // 10}",
        driver=_kernel_module(),
    )


def why_no_gpu() -> str | None:
    """The reason why there is no usable GPU, or None."""
    try:
        gpu()
    except NoGpuError as reason:
        return str(reason)
    return None
