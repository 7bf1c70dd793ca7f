import pytest

from deploy.engine.kernels import Kernel, KernelTensor
from deploy.explain.gpus import GpuPeaks
from deploy.explain.roofline import LAUNCH_SECONDS, limit, seconds

GPU = GpuPeaks("G", 80, bandwidth=1e9, fp16=1e12, int8=4e12)


def kernel(dtype, rows, macs=None):
    """A product of (rows, 100) by a weight of 1000 elements; reads, writes and weight have one type."""
    x, w, y = (
        KernelTensor("x", dtype, (rows, 100), True),
        KernelTensor("w", dtype, (1000,)),
        KernelTensor("y", dtype, (rows, 10), True),
    )
    return Kernel("k", "gemm", (dtype, dtype), (dtype,), (), (x, w), (y,), macs)


@pytest.mark.parametrize(
    ("one", "batch", "cached", "expected", "by"),
    [
        (kernel("fp16", 1000), 2, False, (2 * 1000 * 110 + 1000) * 2 / 1e9, "memory"),
        (kernel("int8", 1000), 2, False, (2 * 1000 * 110 + 1000) / 1e9, "memory"),
        (kernel("fp16", 1000, macs=10**9), 2, False, 2 * 2e9 / 1e12, "compute"),
        (kernel("int8", 1000, macs=10**10), 2, False, 2 * 2e10 / 4e12, "compute"),
        (kernel("fp32", 1000, macs=10**10), 2, False, 2 * 2e10 / 1e12, "compute"),
        (kernel("int8", 1), 2, False, LAUNCH_SECONDS, "launch"),
        (kernel("fp32", 1000), 2, True, 4 * 1000 / 1e9, "memory"),  # the weight alone
    ],
)
def test_the_slowest_of_memory_compute_and_launch_counts(one, batch, cached, expected, by):
    assert seconds([one], GPU, batch, cached) == pytest.approx(expected)
    assert seconds([one, one], GPU, batch, cached) == pytest.approx(2 * expected)
    assert limit(one, GPU, batch) == by
