"""The first visible GPU through cuda-bindings, which torch brings along: CUDA's driver API, in its primary context."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np

from deploy.gpu import answer, started_driver


class CudaDevice:
    """A `Device` (deploy/engine/device.py). Raises NoGpuError with the reason where there is none."""

    def __init__(self) -> None:
        self._driver = started_driver()
        self._made = ExitStack()
        device = self._call("cuDeviceGet", 0)
        context = self._call("cuDevicePrimaryCtxRetain", device)
        self._made.callback(self._call, "cuDevicePrimaryCtxRelease", device)
        self._call("cuCtxSetCurrent", context)  # TensorRT works in the context that is current

    def _call(self, name: str, *arguments: Any) -> Any:
        return answer(self._driver, name, *arguments)

    def _new(self, destroy: str, create: str, *arguments: Any) -> Any:
        """What `create` returns, which `destroy` will take back."""
        made = self._call(create, *arguments)
        self._made.callback(self._call, destroy, made)
        return made

    def alloc(self, size: int) -> int:
        """See `Device`."""
        return int(self._new("cuMemFree", "cuMemAlloc", size))

    def copy_in(self, address: int, array: np.ndarray, stream: int) -> None:
        """See `Device`."""
        self._call("cuMemcpyHtoDAsync", address, array.ctypes.data, array.nbytes, stream)

    def copy_out(self, array: np.ndarray, address: int, stream: int) -> None:
        """See `Device`."""
        self._call("cuMemcpyDtoHAsync", array.ctypes.data, address, array.nbytes, stream)

    def stream(self) -> int:
        """See `Device`. It does not wait for the default stream."""
        flag = self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        return int(self._new("cuStreamDestroy", "cuStreamCreate", int(flag)))

    def synchronize(self, stream: int) -> None:
        """See `Device`."""
        self._call("cuStreamSynchronize", stream)

    def event(self) -> Any:
        """See `Device`."""
        return self._new("cuEventDestroy", "cuEventCreate", int(self._driver.CUevent_flags.CU_EVENT_DEFAULT))

    def record(self, event: Any, stream: int) -> None:
        """See `Device`."""
        self._call("cuEventRecord", event, stream)

    def elapsed_ms(self, begin: Any, end: Any) -> float:
        """See `Device`."""
        self._call("cuEventSynchronize", end)
        return float(self._call("cuEventElapsedTime", begin, end))

    def captured(self, work: Callable[[], None], stream: int) -> Any | None:
        """See `Device`."""
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", stream, mode)
        try:
            work()
        finally:
            graph = self._new("cuGraphDestroy", "cuStreamEndCapture", stream)
        return self._new("cuGraphExecDestroy", "cuGraphInstantiate", graph, 0)

    def launch(self, graph: Any, stream: int) -> None:
        """See `Device`."""
        self._call("cuGraphLaunch", graph, stream)

    def close(self) -> None:
        """See `Device`."""
        self._made.close()
