"""The verbs answer bad input in one line each and exit code 2, also where the Triton client is not installed."""

import sys

import pytest

from deploy import cli
from deploy.serve.server import cpu_models
from tests.unit.deploy.serve.test_shipped import read


def run(capsys, *argv):
    code = cli.main([str(each) for each in argv])
    return code, capsys.readouterr().err.splitlines()


def test_preflight_tells_every_fault_in_a_line_of_its_own(tmp_path, capsys):
    read(tmp_path)
    code, said = run(capsys, "preflight", tmp_path, "--tensorrt", "11.4.0.106")
    assert code == 2
    assert all(line.startswith(f"error: {tmp_path}: ") for line in said)
    for part in ("golden.npz is not recorded", "sample images", "was never run", "was built by TensorRT 10.14.1.48"):
        assert sum(part in line for line in said) == 1
    code, fewer = run(capsys, "preflight", tmp_path, "--cpu", "--allow-sample-calibration")
    assert code == 2
    assert not any("never run" in line or "sample images" in line for line in fewer)


BAD = {
    "no package": (["preflight", "/nowhere"], "no package at '/nowhere'"),
    "no package to write": (["serve-repo", "/nowhere"], "no package at '/nowhere'"),
    "two versions": (["preflight", "x", "--triton", "26.07", "--tensorrt", "10.14"], "not allowed with argument"),
    "unknown container": (["preflight", "x", "--triton", "99.01"], "--triton '99.01': the TensorRT of this container"),
    "no server installed": (["serve", "--environment", "/nowhere", "--repo", "{models}"], "no Triton server in"),
    "nothing to serve": (["serve", "--repo", "/nowhere"], "holds no model for a server without a GPU"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_in_one_line(tmp_path, capsys, case):
    argv, expected = BAD[case]
    (tmp_path / "net_cpu").mkdir()
    (tmp_path / "net_cpu/config.pbtxt").write_text("")
    code, said = run(capsys, *(each.format(models=tmp_path) for each in argv))
    assert (code, len(said)) == (2, 1)
    assert expected in said[0]


def test_a_missing_client_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tritonclient", None)
    code, (said,) = run(capsys, "rollback", "net")
    assert code == 2
    assert "the Triton client is not installed here" in said
    assert "requirements-serve.txt" in said


def test_a_server_without_a_gpu_loads_the_models_for_the_cpu(tmp_path):
    for name in ("net", "net_jpeg", "net_preprocess", "net_cpu", "net_cpu_jpeg", "net_cpu_preprocess"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.pbtxt").write_text("")
    assert cpu_models(tmp_path) == ["net_cpu", "net_cpu_jpeg"]
