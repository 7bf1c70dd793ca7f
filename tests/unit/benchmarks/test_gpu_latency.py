"""Engines take turns, settle first, and are called faster only where they are. Times come from a clock of the test."""

import itertools
import json

import numpy as np
import pytest

from benchmarks import gpu_latency
from benchmarks.gpu_latency import FP16, MOST_WINDOWS, WINDOW, lines, measure, settled, speedup, statistics
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
        found = measure({FP16: a, "int8": b}, batch=4, rounds=10)
    assert clock.order == [FP16, FP16, "int8", "int8"] * (4 * WINDOW + 10)  # the first window does not agree
    assert (found["settled"], found["cuda_graph"], found["batch"]) == (True, True, 4)
    assert found["engines"][FP16]["images_s"] == pytest.approx(2000)
    assert "speedup" not in found["engines"][FP16]
    assert found["engines"]["int8"]["speedup"]["ratio"] == pytest.approx(2.0)
    shown = lines(found)
    assert "2.00x (2.00 to 2.00), faster" in shown[1]
    assert "settled" not in "".join(shown)


def test_what_never_settles_is_measured_and_says_so(api_of):
    clock = Clock()
    growing = (1.1**index for index in itertools.count())
    with opened(api_of("11.4"), clock.of(FP16, growing)) as engine:
        found = measure({FP16: engine}, batch=1, rounds=2)
    assert not found["settled"]
    assert len(clock.order) == 2 * (MOST_WINDOWS * WINDOW + 2)
    assert "(never settled)" in lines(found)[0]


def test_a_device_without_graphs_launches_kernels(api_of, monkeypatch):
    monkeypatch.setattr(HostDevice, "captured", lambda *_: None)
    with opened(api_of("11.4"), Clock().of(FP16, itertools.repeat(1.0))) as engine:
        assert not measure({FP16: engine}, batch=1, rounds=2)["cuda_graph"]


def test_where_nothing_can_run_or_no_package_is_there_it_is_one_line(tmp_path, capsys, monkeypatch, api_of):
    assert gpu_latency.main(["test_vit", "int8", "--target", "tensorrt"]) == 2
    assert "error: TARGET=tensorrt cannot build here" in capsys.readouterr().err
    gpu_host(monkeypatch, api_of("11.4"))
    assert gpu_latency.main(["test_vit", "int8", "--target", "tensorrt", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith("run make engine MODEL=test_vit RECIPE=int8 first\n")


def test_all_of_it_on_a_tiny_network(tmp_path, capsys, monkeypatch, api_of):
    import onnx

    from deploy.package import MANIFEST, MODEL, package_folder, write_json

    trt = gpu_host(monkeypatch, api_of("11.4"))
    monkeypatch.setattr(gpu_latency, "build_apart", lambda backend, *arguments: backend.build(*arguments))
    monkeypatch.setattr(gpu_latency, "BATCHES", (1, 2))
    monkeypatch.setattr(gpu_latency, "WINDOW", 1)
    monkeypatch.setattr(gpu_latency, "ROUNDS", 2)
    monkeypatch.setattr(gpu_latency, "RESULTS", tmp_path)
    devices = []

    def device():
        devices.append(HostDevice())
        return devices[-1]

    class OnTheLatest:
        """Work goes to the device that captures, or to any."""

        def do(self, work):
            next((one for one in devices if one.capturing is not None), devices[-1]).do(work)

    trt.device = OnTheLatest()
    monkeypatch.setattr("deploy.engine.runner.open_device", device)
    folder = package_folder(str(tmp_path), "test_vit", None, "auto", "int8")
    folder.mkdir(parents=True)
    onnx.save(graph(), folder / MODEL)
    write_json(folder / MANIFEST, {"preprocessing": {"height": 160, "width": 160}})
    assert gpu_latency.main(["test_vit", "int8", "--target", "tensorrt", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu_latency.test_vit.json").read_text())
    assert [row["batch"] for row in found["batches"]] == [1, 2]
    assert list(found["batches"][0]["engines"]) == [FP16, "int8"]
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_an_engine_that_cannot_be_captured_launches_kernels_and_says_so(api_of, monkeypatch, capsys):
    def refuses(*_):
        raise CudaError("cuStreamEndCapture: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")

    monkeypatch.setattr(HostDevice, "captured", refuses)
    with opened(api_of("11.4"), Clock().of(FP16, itertools.repeat(1.0))) as engine:
        assert not measure({FP16: engine}, batch=1, rounds=2)["cuda_graph"]
    assert "no CUDA graph (cuStreamEndCapture" in capsys.readouterr().err


def test_graphs_of_a_folder_begin_with_the_one_in_fp16(tmp_path, capsys):
    import onnx

    with pytest.raises(UserError, match=r"holds no graphs: expected fp16.onnx and others to compare"):
        gpu_latency.graphs_in(tmp_path)
    for name in ("a", FP16, "int8"):
        onnx.save(graph(), tmp_path / f"{name}.onnx")
    assert list(gpu_latency.graphs_in(tmp_path)) == [FP16, "a", "int8"]
    assert gpu_latency.main(["test_vit", "int8", "--graphs", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: expected either recipes or --graphs, not both\n"
