"""The whole pipeline as on a GPU host with TensorRT: the stand-in of tests/gpu runs the engine."""

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import gpu_latency, gpu_timing, qwt_latency
from deploy import cli
from deploy.engine import audit
from deploy.engine.architectures import RTX_DEFAULT
from deploy.engine.backends import tensorrt_rtx
from deploy.gpu import Gpu
from tests.gpu.host import HERE, gpu_host
from tests.gpu.host_device import HostDevice

pytestmark = pytest.mark.slow

COMMAND = ["engine", "--model", "test_vit", "--weights", "random", "--calib-images", "16", "--cache", "off"]


def test_the_package_of_a_gpu_host_tells_what_its_engine_computed(tmp_path, api_of, monkeypatch, capsys):
    gpu_host(monkeypatch, api_of("11.4"))
    assert cli.main([*COMMAND, "--target", "tensorrt", "--out", str(tmp_path)]) == 0
    folder = tmp_path / "test_vit-random-weights/int8"
    report, manifest, layers = (
        json.loads((folder / name).read_text()) for name in ("report.json", "manifest.json", "engine_layers.json")
    )
    engine, graph = report["engine"], report["fidelity"]
    assert engine["executed"]
    assert manifest["engine"]["executed"]
    assert engine["fidelity"]["count"] == graph["count"]
    assert engine["fidelity"]["sqnr_db"] == pytest.approx(graph["sqnr_db"], abs=1.0)  # of FP16 types, not FP32
    assert f"yes, on Made-up GPU: SQNR {engine['fidelity']['sqnr_db']:.1f} dB" in capsys.readouterr().out
    assert len(layers["inspector"]["Layers"]) == engine["kernels"]
    assert layers["targets"] == ["SM89"]


def test_an_engine_that_computes_something_else_is_no_package(tmp_path, api_of, monkeypatch, capsys):
    gpu_host(monkeypatch, api_of("10.12"), outputs=np.zeros_like)
    assert cli.main([*COMMAND, "--target", "tensorrt", "--out", str(tmp_path)]) == cli.EXIT_FAILED
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("failed: the engine reaches 0.0 dB on the golden images where model.fp32.onnx reaches")
    assert last.endswith("; no package was written")
    assert not list(tmp_path.rglob("*.onnx"))


def test_what_an_engine_tells_is_kept_where_its_audit_fails(tmp_path, monkeypatch, capsys):
    if reason := tensorrt_rtx.cannot_build():
        pytest.skip(reason)

    def blind(kernels, planned, attention):
        return replace(audit.audit(kernels, planned, attention), lost=("blocks.1.mlp.fc1/MatMul",))

    command = [*COMMAND, "--target", "tensorrt_rtx", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr("deploy.proven.audit", blind)
        assert cli.main(command) == cli.EXIT_FAILED
    kept = tmp_path / "test_vit-random-weights/int8.engine_layers.json"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [kept]
    assert f"what the engine tells of its layers is in '{kept}'" in capsys.readouterr().err.splitlines()[-1]
    told = json.loads(kept.read_text())
    assert told["backend"] == "tensorrt_rtx"
    assert any("blocks.1.mlp.fc1/MatMul" in line for program in told["programs"] for line in program)
    assert cli.main(command) == 0
    assert not kept.exists()
    report = json.loads((tmp_path / "test_vit-random-weights/int8/report.json").read_text())
    assert report["engine"]["targets"] == [*RTX_DEFAULT]
    if tensorrt_rtx.cannot_run():
        assert not report["engine"]["executed"]
        assert report["engine"]["not_executed"] == "no NVIDIA driver"
        assert "engine was run" in capsys.readouterr().out


class SeveralDevices:
    """One device in host memory for every engine that is open; work goes to the one that captures, or to the last."""

    def __init__(self):
        self.opened = []

    def open(self):
        self.opened.append(HostDevice())
        return self.opened[-1]

    def do(self, work):
        next((one for one in self.opened if one.capturing is not None), self.opened[-1]).do(work)


@pytest.fixture
def timing_host(tmp_path, api_of, monkeypatch):
    """A GPU host on which the benchmarks take a few rounds and write into `tmp_path`."""
    trt, devices = gpu_host(monkeypatch, api_of("11.4")), SeveralDevices()
    trt.device = devices
    monkeypatch.setattr("deploy.engine.runner.open_device", devices.open)
    monkeypatch.setattr(gpu_latency, "build_apart", lambda backend, *arguments: backend.build(*arguments))
    monkeypatch.setattr(gpu_latency, "gpu", lambda: HERE)
    monkeypatch.setattr(gpu_latency, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_timing, "WINDOW", 1)
    monkeypatch.setattr(gpu_timing.measure, "__defaults__", (2, 0, None))
    return trt


@pytest.mark.usefixtures("timing_host")
def test_engines_of_packages_are_timed_beside_what_they_compute(tmp_path, capsys):
    of_host = ["--target", "tensorrt", "--out", str(tmp_path)]
    assert cli.main([*COMMAND, *of_host]) == 0
    capsys.readouterr()
    timed = ["test_vit", "int8", "--weights", "random", *of_host, "--batch", "1", "2", "--fp32", "--fp8"]
    assert gpu_latency.main(timed) == 0
    shown = capsys.readouterr()
    found = json.loads(gpu_latency.result_file("test_vit").read_text())
    assert [row["batch"] for row in found["batches"]] == [1, 2]
    assert [*found["batches"][0]["engines"]] == [*found["plans"]] == ["fp16", "fp32", "int8", "int8, FP8"]
    accuracy = {name: plan["golden_sqnr_db"] for name, plan in found["plans"].items()}
    assert accuracy["fp32"] > 100 > accuracy["fp16"] > accuracy["int8"] > 10
    assert accuracy["int8, FP8"] is None
    for plan in found["plans"].values():
        assert plan["bytes"] == (tmp_path / plan["file"]).stat().st_size
    assert "--shapes=input:2x3x160x160" in found["batches"][1]["trtexec"]["int8"]
    assert found["plans"]["int8"]["file"] in found["batches"][1]["trtexec"]["int8"]
    assert len(shown.out.splitlines()) == 2 * (4 + 1)
    assert "clocks unknown: " in shown.out  # the made-up GPU has no NVML
    for chart in ("throughput", "accuracy"):
        assert "<svg" in (tmp_path / f"gpu_latency.test_vit.{chart}.svg").read_text()


@pytest.mark.usefixtures("timing_host")
def test_fp8_on_a_gpu_without_it_is_one_line(tmp_path, monkeypatch, capsys):
    of_host = ["--weights", "random", "--target", "tensorrt", "--out", str(tmp_path)]
    monkeypatch.setattr(gpu_latency, "gpu", lambda: Gpu("older", 86, 1, "13.0", None))
    assert gpu_latency.main(["test_vit", "int8", *of_host, "--fp8"]) == 2
    assert capsys.readouterr().err == "error: --fp8: this GPU (SM86) computes no FP8, expected SM89 or later\n"


@pytest.mark.usefixtures("timing_host")
def test_table_2_of_qwt_is_one_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(qwt_latency, "PUBLISHED", {"test_vit": (11.6, 2.8, 3.2)})
    monkeypatch.setattr(qwt_latency, "RECIPES", ("int8_plain",))  # of three; each is a package
    monkeypatch.setattr(qwt_latency, "BATCH", 2)
    monkeypatch.setattr(qwt_latency, "make", lambda command: cli.main([*command, "--calib-images", "16"]))
    of_host = ["--weights", "random", "--target", "tensorrt", "--out", str(tmp_path)]
    assert qwt_latency.main(["test_vit", *of_host]) == 0
    table = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[1] for line in table] == ["fp16", "fp32", "int8_plain"]
    assert ["published" in line for line in table] == [False, True, True]
    assert qwt_latency.main(["resnet50"]) == 2
    assert capsys.readouterr().err == "error: unknown network 'resnet50': expected some of test_vit\n"
