"""Which networks are tried, and what a row says of each."""

import json
import subprocess

import pytest
import timm

from benchmarks import coverage, intake


def test_the_smallest_of_every_file_are_chosen(monkeypatch):
    sizes = {"resnet18": 3, "resnet34": 2, "resnet50": 1, "vgg11": 5, "vit_tiny_patch16_224": None}
    monkeypatch.setattr(timm, "list_models", lambda: list(sizes))
    monkeypatch.setattr(intake, "parameters", sizes.get)
    assert coverage.smallest() == ["resnet34", "resnet50", "vgg11"]


def done(code, out="", err=""):
    return lambda *_, **__: subprocess.CompletedProcess([], code, out, err)


def late(*_, **__):
    raise subprocess.TimeoutExpired("", 900, stderr=b"  fold 1 s\n  parity  3 s\n")


def test_a_refusal_is_its_line_and_a_traceback_is_a_bug(monkeypatch):
    monkeypatch.setattr(subprocess, "run", done(2, err="loading\nerror: cannot be traced"))
    row = coverage.taken("resnet18")
    assert (row["reason"], row["bug"]) == ("error: cannot be traced", False)
    monkeypatch.setattr(subprocess, "run", done(-9, err="  run   0.0 s  not run\n"))
    row = coverage.taken("resnet18")
    assert (row["reason"], row["bug"]) == ("killed by SIGKILL; told last: run 0.0 s not run", True)
    monkeypatch.setattr(subprocess, "run", late)
    assert coverage.taken("resnet18")["reason"] == "no package within 1800 s; told last: parity 3 s"
    monkeypatch.setattr(subprocess, "run", done(0, out="WARNING of a library\n{}"))
    row = coverage.taken("resnet18")
    assert row["bug"]
    assert "printed no JSON: 'WARNING of a library" in row["reason"]


def test_what_fp16_cannot_hold_is_built_with_fp32_types(monkeypatch):
    asked = []

    def run(command, **_):
        asked.append(command[command.index("--float") + 1])
        said = "error: 'layer' reaches 1e+05: give FLOAT=fp32, whose engines have FP32 types"
        return done(2, err=said)() if asked == ["fp16"] else done(0, out="{}")()

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(coverage, "figures", lambda report: report)
    assert coverage.taken("resnet18")["floats"] == "fp32"
    assert asked == ["fp16", "fp32"]


ROW = {
    "planned": 8, "int8_gemms": 7, "int8_convs": 1, "fused_attention": 2, "kernels": 30, "in_float": 2, "parity": 1e-6,
    "seconds": 12.5,
}  # fmt: skip


@pytest.fixture
def result(tmp_path, monkeypatch):
    path = tmp_path / "coverage.json"
    monkeypatch.setattr(coverage, "RESULT", path)
    monkeypatch.setattr(coverage, "WORKERS", 1)
    monkeypatch.setattr(coverage, "PAGE", tmp_path / "coverage.md")
    monkeypatch.setattr(coverage, "ZOO", {"vit_s": None})
    monkeypatch.setattr(coverage, "smallest", lambda: ["resnet18", "vgg11"])
    monkeypatch.setattr(coverage, "tool_commit", lambda: "abc")
    return path


def test_an_interrupted_run_goes_on(result, monkeypatch):
    tried = []

    def taken(name):
        if len(tried) == 1:
            raise KeyboardInterrupt
        tried.append(name)
        return ROW

    monkeypatch.setattr(coverage, "taken", taken)
    with pytest.raises(KeyboardInterrupt):
        coverage.main([])
    assert not json.loads(result.read_text())["complete"]
    monkeypatch.setattr(coverage, "taken", lambda name: tried.append(name) or {"reason": "no"})
    assert coverage.main([]) == 0
    assert tried == ["vit_s", "resnet18", "vgg11"]
    found = json.loads(result.read_text())
    assert (found["complete"], found["tried"], found["green"]) == (True, 3, 1)
    page = (result.parent / "coverage.md").read_text()
    assert "1 of 3 networks reached a" in page
    assert "| vit_s | 8 | 7 | 1 | 2 | 30 | 12.5 |\n" in page
    assert page.endswith("Without a package:\n\n- resnet18: no\n- vgg11: no\n")
    assert coverage.main([]) == 0, "a complete run begins anew"
    assert tried[3:] == ["vit_s", "resnet18", "vgg11"]


def test_short_names_and_architectures_are_chosen_by_pattern(result, monkeypatch):
    tried = []
    monkeypatch.setattr(coverage, "taken", lambda name: tried.append(name) or ROW)
    monkeypatch.setattr(coverage, "ZOO", {"vit_s": None, "resnet18": None})
    assert coverage.main(["vit_s*", "resnet18"]) == 0
    assert tried.count("resnet18") == 1, "a short name that timm has too"
    found = json.loads(result.read_text())["networks"]
    assert {"vit_s", "resnet18", "vit_small_patch16_224"} <= {*found}
    assert all("vit_s" in name or name == "resnet18" for name in found)
    assert all(row == {**ROW, "commit": "abc"} for row in found.values())


def test_no_network_of_that_name(result, capsys):
    assert coverage.main(["no_such_*"]) == 2
    assert "no network matches no_such_*" in capsys.readouterr().err
    assert not result.exists()
