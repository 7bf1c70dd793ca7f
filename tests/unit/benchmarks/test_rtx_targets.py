"""What every target gives becomes a row, also where it fails; without a GPU nothing is tried."""

import json

import pytest

from benchmarks import rtx_targets
from calib.errors import UserError
from deploy.engine.isolated import CrashError
from deploy.gpu import why_no_gpu


@pytest.mark.skipif(why_no_gpu() is None, reason="there is a GPU")
def test_without_a_gpu_it_is_one_line(capsys):
    assert rtx_targets.main(["model.onnx"]) == 2
    assert capsys.readouterr().err == "error: nothing can be tried here: no NVIDIA driver\n"


def test_every_target_is_a_row(tmp_path, monkeypatch, capsys):
    def tried(_measure, graph, target):
        assert graph == "model.onnx"
        if target == "SM75":
            raise UserError("could not build")
        if target == "SM80":
            raise CrashError("SIGSEGV")
        return {"validity": "VALID", "diagnostics": 0, "loads": True}

    monkeypatch.setattr(rtx_targets, "why_no_gpu", lambda: None)
    monkeypatch.setattr(rtx_targets, "isolated", tried)
    monkeypatch.setattr(rtx_targets, "RESULT", tmp_path / "found.json")
    assert rtx_targets.main(["model.onnx"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["target"] for row in found["rows"]] == [*rtx_targets.TARGETS]
    by_target = {row["target"]: row for row in found["rows"]}
    assert by_target["SM75"] == {"target": "SM75", "said": "could not build"}
    assert by_target["SM80"] == {"target": "SM80", "said": "SIGSEGV"}
    assert by_target["CURRENT"]["loads"]
    assert found["command"] == "python -m benchmarks.rtx_targets model.onnx"
    assert len(capsys.readouterr().out.splitlines()) == len(rtx_targets.TARGETS)
