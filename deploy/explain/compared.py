"""Two engines of one network, on one GPU, for one batch: what the causes look at."""

from collections.abc import Iterable
from dataclasses import dataclass

from deploy.engine.kernels import Kernel
from deploy.explain.gpus import GpuPeaks
from deploy.explain.roofline import seconds
from deploy.graph.names import operator_from_name

PRODUCTS = ("gemm", "conv")


@dataclass(frozen=True)
class Compared:
    """The kernels of an INT8 engine, and those of its FP16 twin if it is known."""

    int8: tuple[Kernel, ...]
    fp16: tuple[Kernel, ...] | None
    gpu: GpuPeaks
    batch: int

    def ratio(self, batch: int | None = None, cached: bool = False) -> float | None:
        """The estimated time of FP16 over that of INT8, here or for another `batch`; None without a twin."""
        if self.fp16 is None:
            return None
        images = batch or self.batch
        return seconds(self.fp16, self.gpu, images, cached) / seconds(self.int8, self.gpu, images, cached)


def covered(kernels: Iterable[Kernel], operators: Iterable[str], *kinds: str) -> set[str]:
    """The ONNX nodes with one of these `operators` that kernels of these `kinds` cover."""
    wanted = {*operators}
    return {
        layer
        for kernel in kernels
        if kernel.kind in kinds
        for layer in kernel.layers
        if operator_from_name(layer) in wanted
    }
