"""The whole pipeline as on a GPU host with TensorRT: the stand-in of tests/gpu runs the engine."""

import json
from dataclasses import replace

import numpy as np
import pytest

from deploy import cli
from deploy.engine import audit
from deploy.engine.architectures import RTX_DEFAULT
from deploy.engine.backends import tensorrt_rtx
from tests.gpu.host import gpu_host

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
