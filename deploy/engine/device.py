"""The GPU as an engine runner needs it: addresses, copies, one stream or several, events and graphs.

An address, a stream, an event and a graph are what the library behind a device hands out; only the device that made them
may take them back, and it does so when it is closed.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np


class Device(Protocol):
    """A GPU. Its calls raise RuntimeError with the name of CUDA's error."""

    def alloc(self, size: int) -> int:
        """The address of `size` bytes (1 or more) of device memory."""

    def copy_in(self, address: int, array: np.ndarray, stream: int) -> None:
        """Copy a contiguous array to device memory, in the order of `stream`; it may not change before that is done."""

    def copy_out(self, array: np.ndarray, address: int, stream: int) -> None:
        """Fill a contiguous array from device memory, in the order of `stream`."""

    def stream(self) -> int:
        """A new stream, as CUDA's handle."""

    def synchronize(self, stream: int) -> None:
        """Wait until all that was put on `stream` is done."""

    def event(self) -> Any:
        """A new event."""

    def record(self, event: Any, stream: int) -> None:
        """Let `event` tell when `stream` comes to here."""

    def elapsed_ms(self, begin: Any, end: Any) -> float:
        """Milliseconds between two recorded events; waits for `end`."""

    def captured(self, work: Callable[[], None], stream: int) -> Any | None:
        """The graph of all that `work` puts on `stream`, which is not done yet; None where the library has no graphs."""

    def launch(self, graph: Any, stream: int) -> None:
        """Do all that a graph holds."""

    def close(self) -> None:
        """Give back everything that this device made."""


def open_device() -> Device:
    """The first visible GPU: through PyCUDA where it is installed, as nobody has it by accident, else cuda-bindings.

    Raises NoGpuError with the reason where there is no GPU, and UserError for a PyCUDA that cannot be loaded.
    """
    if importlib.util.find_spec("pycuda"):
        from deploy.engine.pycuda_device import PycudaDevice

        return PycudaDevice()
    from deploy.engine.cuda_device import CudaDevice

    return CudaDevice()
