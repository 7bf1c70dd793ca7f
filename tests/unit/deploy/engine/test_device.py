"""Devices move bytes, keep time and give everything back: over a CUDA driver in host memory, and over numpy."""

import ctypes
import importlib.util
import inspect

import numpy as np
import pytest

from deploy.engine.cuda_device import CudaDevice
from deploy.engine.device import Device
from deploy.engine.pycuda_device import PycudaDevice
from deploy.gpu import why_no_gpu
from tests.gpu.fake_cuda import fake_cuda, printed
from tests.gpu.host_device import HostDevice

USED = """
import ctypes, sys
import numpy as np
{opened}
array = np.arange(10, dtype=np.float16)
address, other, stream = device.alloc(array.nbytes), device.alloc(3), device.stream()
assert address != other and isinstance(address, int) and isinstance(stream, int) and stream
device.copy_in(address, array, stream)
back = np.zeros_like(array)
device.copy_out(back, address, stream)
device.synchronize(stream)
assert np.array_equal(back, array), back
begin, end = device.event(), device.event()
device.record(begin, stream)
device.record(end, stream)
assert device.elapsed_ms(begin, end) > 0
back[:] = 0
graph = device.captured(lambda: device.copy_out(back, address, stream), stream)
if graph is not None:
    assert not back.any()
    device.launch(graph, stream)
    device.synchronize(stream)
    assert np.array_equal(back, array)
device.close()
{closed}
print("done")
"""
CUDA = "from deploy.engine.cuda_device import CudaDevice; device = CudaDevice()"
ALL_GIVEN_BACK = "assert ctypes.CDLL('libcuda.so.1').fake_live() == 0"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return fake_cuda(tmp_path_factory.mktemp("cuda"))


def test_cuda_bindings_move_bytes_and_everything_is_given_back(library):
    assert printed(USED.format(opened=CUDA, closed=ALL_GIVEN_BACK), library) == "done"


def test_the_device_in_host_memory_does_the_same():
    script = USED.format(opened="from tests.gpu.host_device import HostDevice; device = HostDevice()", closed="")
    assert printed(script, None) == "done"


@pytest.mark.skipif(why_no_gpu() is not None, reason=f"no GPU: {why_no_gpu()}")
@pytest.mark.parametrize("name", ["cuda", "pycuda"])
def test_a_real_gpu_does_the_same(name):
    if not importlib.util.find_spec(name):
        pytest.skip(f"{name} is not installed")
    kind = f"{name.capitalize()}Device"
    opened = f"from deploy.engine.{name}_device import {kind}; device = {kind}()"
    assert printed(USED.format(opened=opened, closed=""), None) == "done"


@pytest.mark.parametrize(
    ("fails", "call"),
    [
        ("cuMemAlloc", "device.alloc(8)"),
        ("cuStreamCreate", "device.stream()"),
        ("cuGraphInstantiateWithFlags", "device.captured(lambda: None, device.stream())"),
    ],
)
def test_an_error_of_cuda_is_named_and_what_was_made_is_given_back(library, fails, call):
    script = f"""
import ctypes
{CUDA}
try: {call}
except RuntimeError as error: print(error)
device.close()
{ALL_GIVEN_BACK}
"""
    named = fails.removesuffix("WithFlags")
    assert printed(script, library, FAKE_CUDA_FAILS=fails) == f"{named}: CUDA_ERROR_OUT_OF_MEMORY"


def test_work_that_raises_ends_its_capture(library):
    script = f"""
import ctypes
{CUDA}
def work(): raise ZeroDivisionError
stream = device.stream()
try: device.captured(work, stream)
except ZeroDivisionError: device.synchronize(stream)
device.close()
{ALL_GIVEN_BACK}
print("done")
"""
    assert printed(script, library) == "done"


@pytest.mark.skipif(why_no_gpu() is None, reason="there is a GPU")
def test_where_there_is_no_gpu_the_reason_is_said():
    script = """
from deploy.engine.device import open_device
from deploy.gpu import NoGpuError
try: open_device()
except NoGpuError as reason: print(reason)
"""
    assert printed(script, None) == "no NVIDIA driver"


@pytest.mark.parametrize("kind", [CudaDevice, PycudaDevice, HostDevice])
def test_every_device_has_the_calls_of_the_protocol(kind):
    for name, call in inspect.getmembers(Device, inspect.isfunction):
        if not name.startswith("_"):
            expected = [each.lstrip("_") for each in inspect.signature(call).parameters]
            assert [each.lstrip("_") for each in inspect.signature(getattr(kind, name)).parameters] == expected, name


def test_memory_of_the_device_in_host_memory_is_not_cleared():
    device = HostDevice()
    assert ctypes.string_at(device.alloc(4), 4) == b"\xaa" * 4
    assert np.float16(0) not in np.frombuffer(device.buffers[0], np.float16)
