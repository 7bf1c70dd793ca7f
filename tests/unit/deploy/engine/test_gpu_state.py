"""Clocks, power and temperature are those that NVML tells of the GPU that CUDA computes on; where it does not, why."""

import json

import pytest

from deploy.gpu import why_no_gpu
from tests.gpu.fake_cuda import fake_cuda, fake_nvml, printed

WATCHED = """
import ctypes, json
from deploy.engine.gpu_state import GpuMonitor
with GpuMonitor() as monitor:
    for _ in range(3):
        monitor.look()
    print(json.dumps([monitor.summary(), monitor.states, monitor.reason]))

"""
ALL_GIVEN_BACK = "\nassert ctypes.CDLL('libnvidia-ml.so.1').fake_started() == 0"
no_driver = pytest.mark.skipif(why_no_gpu() is None, reason="there is a GPU")


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    folder = fake_cuda(tmp_path_factory.mktemp("nvml"))
    return fake_nvml(folder)


def summary(library, script=WATCHED + ALL_GIVEN_BACK, **environment):
    found, states, reason = json.loads(printed(script, library, **environment))
    assert states == []  # a summary begins anew
    assert reason == found.get("unknown")
    return found


def test_what_the_driver_tells_is_summed_up(libraries):
    assert summary(libraries) == {
        "sm_clock": [1950, 1980], "memory_clock": [2619, 2619], "power": [412.5, 412.5], "temperature": [61, 61],
        "highest_sm_clock": 1980, "power_limit": 700.0, "slowed": [], "clocks_set": False, "looks": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("bits", "slowed", "clocks_set"),
    [
        ("0x1", [], False), ("0x2", [], True), ("0x4", ["limit of power"], False),
        ("0xe8", ["hardware slowdown", "power brake", "temperature", "temperature (hardware)"], False),
    ],
)  # fmt: skip
def test_why_clocks_are_lowered_is_told(libraries, bits, slowed, clocks_set):
    found = summary(libraries, FAKE_NVML_REASONS=bits)
    assert (found["slowed"], found["clocks_set"]) == (slowed, clocks_set)


@pytest.mark.parametrize(
    ("function", "key"),
    [
        ("nvmlDeviceGetPowerUsage", "power"), ("nvmlDeviceGetTemperatureV", "temperature"),
        ("nvmlDeviceGetEnforcedPowerLimit", "power_limit"), ("nvmlDeviceGetMaxClockInfo", "highest_sm_clock"),
        ("nvmlDeviceGetClockInfo", "sm_clock"),
    ],
)  # fmt: skip
def test_what_a_gpu_does_not_tell_is_unknown_and_the_rest_is_there(libraries, function, key):
    found = summary(libraries, FAKE_NVML_FAILS=function)
    assert found[key] is None
    assert found["looks"] == 3


def test_an_old_driver_tells_all_but_the_reasons(tmp_path):
    found = summary(fake_nvml(fake_cuda(tmp_path), "-DOLD"))
    assert (found["slowed"], found["clocks_set"]) == (None, None)
    assert found["power"] == [412.5, 412.5]


def test_a_gpu_that_nvml_does_not_find_is_a_reason(libraries):
    found = summary(libraries, FAKE_CUDA_FAILS="cuDeviceGetPCIBusId")
    assert "the driver does not find the GPU for its clocks (cuDeviceGetPCIBusId" in found["unknown"]


@no_driver
def test_without_nvml_the_reason_is_told():
    assert "NVML cannot be loaded" in summary(None, WATCHED)["unknown"]


def test_bindings_without_nvml_are_a_reason():
    script = "import sys; sys.modules['cuda.bindings.nvml'] = None\n" + WATCHED
    assert summary(None, script)["unknown"] == "this version of cuda-bindings has no NVML"
