"""The first visible GPU through PyCUDA (`make setup-pycuda`), in its primary context."""

from collections.abc import Callable
from typing import Any

import numpy as np

from calib.errors import UserError
from deploy.engine.loading import why_not_loaded
from deploy.gpu import NoGpuError


class PycudaDevice:
    """A `Device` (deploy/engine/device.py) without graphs, which PyCUDA does not have.

    Raises NoGpuError where there is no GPU, and UserError where PyCUDA cannot be loaded.
    """

    def __init__(self) -> None:
        if reason := why_not_loaded("pycuda.driver", "make setup-pycuda again, or pip uninstall pycuda"):
            raise UserError(reason)
        import pycuda.driver

        self._driver = pycuda.driver
        try:
            self._driver.init()
            self._context = self._driver.Device(0).retain_primary_context()
        except self._driver.Error as error:
            raise NoGpuError(f"PyCUDA finds no usable GPU ({error})") from None
        self._context.push()
        self._buffers: list[Any] = []
        self._streams: dict[int, Any] = {}

    def alloc(self, size: int) -> int:
        """See `Device`."""
        try:
            self._buffers.append(self._driver.mem_alloc(size))
        except self._driver.Error as error:  # which is no RuntimeError
            raise RuntimeError(str(error)) from error
        return int(self._buffers[-1])

    def copy_in(self, address: int, array: np.ndarray, stream: int) -> None:
        """See `Device`."""
        self._driver.memcpy_htod_async(address, array, self._streams[stream])

    def copy_out(self, array: np.ndarray, address: int, stream: int) -> None:
        """See `Device`."""
        self._driver.memcpy_dtoh_async(array, address, self._streams[stream])

    def stream(self) -> int:
        """See `Device`."""
        made = self._driver.Stream()
        self._streams[made.handle] = made
        return made.handle

    def synchronize(self, stream: int) -> None:
        """See `Device`."""
        self._streams[stream].synchronize()

    def event(self) -> Any:
        """See `Device`."""
        return self._driver.Event()

    def record(self, event: Any, stream: int) -> None:
        """See `Device`."""
        event.record(self._streams[stream])

    def elapsed_ms(self, begin: Any, end: Any) -> float:
        """See `Device`."""
        end.synchronize()
        return end.time_since(begin)

    def captured(self, _work: Callable[[], None], _stream: int) -> Any | None:
        """See `Device`."""
        return None

    def launch(self, _graph: Any, _stream: int) -> None:
        """See `Device`; there are no graphs to launch."""
        raise NotImplementedError("PyCUDA has no graphs")

    def close(self) -> None:
        """See `Device`."""
        for buffer in self._buffers:
            buffer.free()
        self._buffers.clear()
        self._streams.clear()
        self._context.pop()
        self._context.detach()
