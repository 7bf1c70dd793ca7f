"""A first estimate of the time of an engine, kernel by kernel, from what its kernels move and multiply.

    t = max(bytes / bandwidth, operations / peak of the type, LAUNCH_SECONDS)      summed over kernels

It is computed with two amounts of bytes: all that kernels read and write, as if there were no cache; and weights alone, as
if a cache held every activation. Neither is a measurement: nothing reaches its peak, small products least of all, and
LAUNCH_SECONDS is an assumption. What the estimates are good for is a comparison of two engines of one network.
"""

from collections.abc import Iterable

from deploy.engine.kernels import Kernel, bytes_moved
from deploy.explain.gpus import GpuPeaks

LAUNCH_SECONDS = 2e-6  # assumed, not measured: the least time from one kernel to the next, also in a CUDA graph
BATCHES = (1, 8, 32, 128)
ASSUMPTIONS = (
    "every tensor moves between the GPU and its memory each time a kernel reads or writes it; the second of two ratios is "
    "for the other end, a cache that holds all activations",
    "products run at the peak of their type, FP32 and unknown types at that of FP16",
    f"no kernel takes less than {LAUNCH_SECONDS * 1e6:.0f} us, and kernels run one after another",
    "convolutions planned for INT8 run in INT8",
)


def memory_seconds(kernel: Kernel, gpu: GpuPeaks, batch: int, cached: bool = False) -> float:
    """The time to move what `kernel` reads and writes for a `batch` of images; weights alone if activations are `cached`."""
    if not cached:
        return bytes_moved([kernel], batch) / gpu.bandwidth
    return sum(tensor.bytes(batch) for tensor in kernel.reads if not tensor.grows) / gpu.bandwidth


def compute_seconds(kernel: Kernel, gpu: GpuPeaks, batch: int) -> float:
    """The time of the products of `kernel` for a `batch` of images at the peak of their type."""
    return 2 * (kernel.macs or 0) * batch / (gpu.int8 if kernel.precision == "int8" else gpu.fp16)


def seconds(kernels: Iterable[Kernel], gpu: GpuPeaks, batch: int, cached: bool = False) -> float:
    """The estimated time of the `kernels` for a `batch` of images."""
    return sum(
        max(memory_seconds(kernel, gpu, batch, cached), compute_seconds(kernel, gpu, batch), LAUNCH_SECONDS)
        for kernel in kernels
    )


def limit(kernel: Kernel, gpu: GpuPeaks, batch: int) -> str:
    """What limits `kernel` in the estimate without a cache: "launch", "memory" or "compute"."""
    memory, compute = memory_seconds(kernel, gpu, batch), compute_seconds(kernel, gpu, batch)
    if max(memory, compute) < LAUNCH_SECONDS:
        return "launch"
    return "memory" if memory >= compute else "compute"
