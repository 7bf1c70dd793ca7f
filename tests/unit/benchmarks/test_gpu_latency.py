"""Engines take turns, settle first, and are called faster only where they are. Times come from a clock of the test."""

import itertools

import numpy as np
import pytest

from benchmarks import gpu_graphs, gpu_latency
from benchmarks.gpu_graphs import FP16
from benchmarks.gpu_latency import gpu_line, lines, trtexec
from benchmarks.gpu_timing import MOST_WINDOWS, ROUNDS, SECONDS, WINDOW, measure, settled, speedup, statistics
from calib.errors import UserError
from deploy.engine.build import Profile, serialize_network
from deploy.engine.runner import EngineRunner
from deploy.gpu import CudaError
from tests.gpu.fake_trt import FakeTensorRT
from tests.gpu.host import gpu_host
from tests.gpu.host_device import HostDevice
from tests.unit.deploy.engine.test_runner import graph


@pytest.mark.parametrize(
    ("medians", "expected"),
    [
        ([], False), ([1.0, 1.0], False), ([1.0, 1.0, 1.0], True), ([9.0, 1.0, 1.005, 1.01], True),
        ([1.0, 1.0, 1.02], False), ([1.0, 1.0, 1.0, 2.0], False),
    ],
)  # fmt: skip
def test_times_have_settled_when_three_windows_agree_within_one_per_cent(medians, expected):
    assert settled(medians) is expected


def test_statistics_are_those_of_sorted_times():
    found = statistics([*range(1, 102)], 8)  # 1 to 101 ms: percentile p is the value 1 + p
    assert found == pytest.approx({"median_ms": 51, "p90_ms": 91, "p99_ms": 100, "images_s": 8 / 0.051})


@pytest.mark.parametrize(
    ("factor", "noise", "verdict"),
    [(1.5, 0.01, "faster"), (1.01, 0.0, "alike"), (0.5, 0.01, "slower"), (1.03, 5.0, "alike"), (0.99, 0.0, "alike")],
)
def test_an_engine_is_faster_only_beyond_the_clock_and_the_noise(factor, noise, verdict):
    candidate = 1 + np.abs(np.random.default_rng(1).normal(0, noise, 40))
    found = speedup(factor * np.ones(40) * (1 if noise < 1 else np.median(candidate)), candidate)
    assert found["verdict"] == verdict
    assert found["low"] <= found["ratio"] <= found["high"]


class Clock:
    """Times (ms) of every launch, with what was launched in order."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def of(self, name, durations):
        """A clock for the events of one engine: every second event is later by the next of `durations`."""
        durations = iter(durations)

        def at():
            if len(self.order) % 2:
                self.now += next(durations)
            self.order.append(name)
            return self.now

        return at


def opened(api, clock):
    device = HostDevice(clock)
    trt = FakeTensorRT(api, device)
    plan, _ = serialize_network(trt, graph().SerializeToString(), Profile(2, 8), lambda _config: None)
    return EngineRunner(plan, trt, device)


def test_engines_take_turns_and_are_compared_with_the_first(api):
    clock = Clock()
    slow, fast = itertools.chain([9.0] * WINDOW, itertools.repeat(2.0)), itertools.repeat(1.0)
    with opened(api, clock.of(FP16, slow)) as a, opened(api, clock.of("int8", fast)) as b:
        found = measure({FP16: a, "int8": b}, batch=4, rounds=10, seconds=0)
    assert clock.order == [FP16, FP16, "int8", "int8"] * (4 * WINDOW + 10)  # the first window does not agree
    assert (found["settled"], found["cuda_graph"], found["batch"]) == (True, True, 4)
    assert found["engines"][FP16]["images_s"] == pytest.approx(2000)
    assert "speedup" not in found["engines"][FP16]
    assert found["engines"]["int8"]["speedup"]["ratio"] == pytest.approx(2.0)
    shown = lines(found)
    assert "2.00x (2.00 to 2.00), faster" in shown[1]
    assert "settled" not in "".join(shown)


def test_short_times_are_taken_for_three_seconds(api):
    with opened(api, Clock().of(FP16, itertools.repeat(1.0))) as engine:
        found = measure({FP16: engine}, batch=1)
    assert (ROUNDS, SECONDS) == (200, 3.0)
    assert found["rounds"] == 3000


class Monitor:
    """Counts its looks in place of a driver."""

    def __init__(self):
        self.looks = 0

    def look(self):
        self.looks += 1

    def summary(self):
        seen, self.looks = self.looks, 0
        return {"looks": seen}


def test_the_gpu_is_looked_at_between_the_rounds_that_count(api_of):
    with opened(api_of("11.4"), Clock().of(FP16, itertools.repeat(1.0))) as engine:
        found = measure({FP16: engine}, batch=1, rounds=3 * WINDOW, seconds=0, monitor=Monitor())
    assert found["gpu"] == {"looks": 3}  # and not those of warming up


GPU = {
    "sm_clock": [1410, 1980], "memory_clock": [2619, 2619], "power": [300.0, 412.5], "temperature": [58, 61],
    "highest_sm_clock": 1980, "power_limit": 700.0, "slowed": ["limit of power"], "clocks_set": True, "looks": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("gpu", "line"),
    [
        (None, None),
        ({"unknown": "no NVML"}, "  clocks unknown: no NVML"),
        (GPU, "  SM clock 1410 to 1980 MHz (at most 1980), 412 of 700 W, 61 C, clocks lowered by limit of power, "
              "clocks set by hand"),
        (GPU | {"sm_clock": None, "power": None, "temperature": None, "slowed": None, "clocks_set": None},
         "  the driver tells nothing of clocks"),
    ],
)  # fmt: skip
def test_what_the_gpu_did_is_one_line(gpu, line):
    assert gpu_line(gpu) == line


@pytest.mark.parametrize(
    ("version", "graph", "flags"),
    [
        ("10.12.0.36", True, " --noDataTransfers --useSpinWait --useCudaGraph"), ("11.4.0", True, ""),
        ("10.16.1", False, " --noDataTransfers --useSpinWait"), ("11.4.0", False, " --noCudaGraph"),
    ],
)  # fmt: skip
def test_the_command_of_trtexec_names_all_that_other_versions_do_otherwise(api_of, version, graph, flags):
    with opened(api_of("11.4"), Clock().of(FP16, itertools.repeat(1.0))) as engine:
        shown = trtexec(version, "a.engine", engine, 8, graph)
    assert shown == (
        "trtexec --loadEngine=a.engine --shapes=x:8x6,y:8x2 --warmUp=200 --duration=3 --iterations=200 "
        f"--percentile=90,99{flags}"
    )


def test_what_never_settles_is_measured_and_says_so(api_of):
    clock = Clock()
    growing = (1.1**index for index in itertools.count())
    with opened(api_of("11.4"), clock.of(FP16, growing)) as engine:
        found = measure({FP16: engine}, batch=1, rounds=2, seconds=0)
    assert not found["settled"]
    assert len(clock.order) == 2 * (MOST_WINDOWS * WINDOW + 2)
    assert "(never settled)" in lines(found)[0]


def test_a_device_without_graphs_launches_kernels(api_of, monkeypatch):
    monkeypatch.setattr(HostDevice, "captured", lambda *_: None)
    with opened(api_of("11.4"), Clock().of(FP16, itertools.repeat(1.0))) as engine:
        assert not measure({FP16: engine}, batch=1, rounds=2, seconds=0)["cuda_graph"]


def test_where_nothing_can_run_or_no_package_is_there_it_is_one_line(tmp_path, capsys, monkeypatch, api_of):
    assert gpu_latency.main(["test_vit", "int8", "--target", "onnxruntime"]) == 2
    assert capsys.readouterr().err == "error: --target onnxruntime: expected auto, tensorrt, tensorrt_rtx\n"
    assert gpu_latency.main(["test_vit", "int8", "--target", "tensorrt"]) == 2
    assert "error: TARGET=tensorrt cannot build here" in capsys.readouterr().err
    gpu_host(monkeypatch, api_of("11.4"))
    assert gpu_latency.main(["test_vit", "int8", "--target", "tensorrt", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith("run make engine MODEL=test_vit RECIPE=int8 first\n")


def test_an_engine_that_cannot_be_captured_launches_kernels_and_says_so(api_of, monkeypatch, capsys):
    def refuses(*_):
        raise CudaError("cuStreamEndCapture: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")

    monkeypatch.setattr(HostDevice, "captured", refuses)
    with opened(api_of("11.4"), Clock().of(FP16, itertools.repeat(1.0))) as engine:
        assert not measure({FP16: engine}, batch=1, rounds=2, seconds=0)["cuda_graph"]
    assert "no CUDA graph (cuStreamEndCapture" in capsys.readouterr().err


def test_the_others_are_timed_without_what_is_optional_and_cannot_be_built(tmp_path, monkeypatch, capsys):
    def refuses(*_):
        raise UserError("the parser knows no FP8\nmore")

    monkeypatch.setattr(gpu_latency, "build_apart", refuses)
    optional, needed = (gpu_graphs.Subject(graph(), optional=each) for each in (True, False))
    assert gpu_latency.built("int8, FP8", optional, None, Profile(1, 1), tmp_path) is None
    assert capsys.readouterr().err == "no engine int8, FP8: the parser knows no FP8\n"
    with pytest.raises(UserError, match="knows no FP8"):
        gpu_latency.built("int8", needed, None, Profile(1, 1), tmp_path)
    assert not [*tmp_path.iterdir()]


def test_graphs_of_a_folder_begin_with_the_one_in_fp16(tmp_path, capsys):
    import onnx

    with pytest.raises(UserError, match=r"holds no graphs: expected fp16.onnx and others to compare"):
        gpu_graphs.graphs_in(tmp_path)
    for name in ("a", FP16, "int8"):
        onnx.save(graph(), tmp_path / f"{name}.onnx")
    assert list(gpu_graphs.graphs_in(tmp_path)) == [FP16, "a", "int8"]
    assert gpu_latency.main(["test_vit", "int8", "--graphs", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: expected either recipes, such as int8, or --graphs FOLDER\n"
    assert gpu_latency.main(["test_vit", "--fp8", "--graphs", str(tmp_path)]) == 2
    assert "error: --fp32 and --fp8 are made of packages" in capsys.readouterr().err
    assert gpu_latency.main(["test_vit", "int8", "--batch", "0"]) == 2
    assert capsys.readouterr().err == "error: --batch 0: expected 1 or more\n"
