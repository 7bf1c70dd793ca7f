"""A few GPUs, with the peaks that their maker states: what an estimate of kernel times divides by.

All are dense: figures that a data sheet states "with sparsity" are halved. The FP16 peak is that with FP16 sums, where a
sheet tells it from sums in FP32.
"""

from dataclasses import dataclass

from calib.errors import UserError, suggestion

FP8_SM = 89  # the first architecture that multiplies FP8


@dataclass(frozen=True)
class GpuPeaks:
    """A GPU: `sm` its architecture, `bandwidth` of its memory in byte/s, `fp16` and `int8` operations/s at their peaks.

    A multiply-add is two operations.
    """

    name: str
    sm: int
    bandwidth: float
    fp16: float
    int8: float

    @property
    def has_fp8(self) -> bool:
        """Whether it multiplies FP8 as fast as INT8."""
        return self.sm >= FP8_SM


_GPUS = (
    # NVIDIA T4 data sheet (2019): 320 GB/s, 65 TFLOPS mixed precision, 130 TOPS INT8
    GpuPeaks("T4", 75, 320e9, 65e12, 130e12),
    # NVIDIA A100 80GB data sheet, SXM: 2039 GB/s, 312 TFLOPS, 624 TOPS
    GpuPeaks("A100", 80, 2039e9, 312e12, 624e12),
    # NVIDIA A10 data sheet: 600 GB/s, 125 TFLOPS, 250 TOPS
    GpuPeaks("A10", 86, 600e9, 125e12, 250e12),
    # NVIDIA Ampere GA102 whitepaper, table of GeForce RTX 3090: 936 GB/s, 142 TFLOPS with FP16 sums, 284 TOPS
    GpuPeaks("RTX3090", 86, 936e9, 142e12, 284e12),
    # NVIDIA Jetson AGX Orin Series technical brief, 64GB module, GPU alone: 204.8 GB/s, 170 sparse INT8 TOPS, so 85 dense
    # and half of it in FP16
    GpuPeaks("Orin", 87, 204.8e9, 42.5e12, 85e12),
    # NVIDIA L4 data sheet: 300 GB/s; 242 TFLOPS and 485 TOPS with sparsity
    GpuPeaks("L4", 89, 300e9, 121e12, 242.5e12),
    # NVIDIA Ada GPU architecture whitepaper, table of GeForce RTX 4090: 1008 GB/s, 330.3 TFLOPS with FP16 sums, 660.6 TOPS
    GpuPeaks("RTX4090", 89, 1008e9, 330.3e12, 660.6e12),
    # NVIDIA H100 data sheet, SXM: 3.35 TB/s; 1979 TFLOPS and 3958 TOPS with sparsity
    GpuPeaks("H100", 90, 3350e9, 989.5e12, 1979e12),
)
GPUS = {gpu.name: gpu for gpu in _GPUS}


def gpu_from_name(name: str) -> GpuPeaks:
    """The GPU of this name, in capital letters or not. Raises UserError for one that is not in the table."""
    by_name = {known.lower(): gpu for known, gpu in GPUS.items()}
    wanted = name.lower().replace(" ", "")
    if wanted not in by_name:
        raise UserError(f"no figures of the GPU '{name}': expected {', '.join(GPUS)}.{suggestion(name, GPUS)}")
    return by_name[wanted]
