"""A package gets a new engine on another host. Oracles: the first engine, and a stand-in for TensorRT."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from calib.store.digests import file_sha256
from deploy import cli
from deploy.engine import audit
from deploy.package import FILES
from deploy.serve.rebuild import STAY
from deploy.verify import file_faults, verify_package
from tests.gpu.host import gpu_host

pytestmark = pytest.mark.slow

pytest.importorskip("tensorrt_rtx")

ALLOW = ["--allow-random-weights", "--allow-sample-calibration"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    command = [
        "engine", "--model", "test_vit", "--weights", "random", "--recipe", "int8_plain", "--calib-images", "16", "--cache",
        "off", "--target", "tensorrt_rtx", "--sm", "89", "--batch", "2", "--max-batch", "4", "--max-drop", "10dB", "--out",
        str(out),
    ]  # fmt: skip
    assert cli.main(command) == 0
    return out / "test_vit-random-weights/int8_plain"


@pytest.fixture
def package(built, tmp_path):
    return shutil.copytree(built, tmp_path / "package")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def told(folder):
    """(manifest, report)."""
    return tuple(json.loads((folder / f"{name}.json").read_text()) for name in ("manifest", "report"))


def test_the_same_target_gives_the_same_engine(package, capsys):
    before, (old, _) = contents(package), told(package)
    assert cli.main(["rebuild", str(package), "--target", "tensorrt_rtx", "--sm", "89"]) == 0
    assert "engine not run: no NVIDIA driver" in capsys.readouterr().out
    after, (manifest, report) = contents(package), told(package)
    same = {*FILES} - {
        "manifest.json",
        "report.json",
        "kernels.json",
        "model.engine",
    }  # whose bytes may differ by build
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    assert len(after["model.engine"]) == len(before["model.engine"])
    assert json.loads(after["kernels.json"])["int8"] == json.loads(before["kernels.json"])["int8"]
    assert verify_package(package) == []
    assert manifest["io"] == old["io"]
    assert manifest["engine"] == old["engine"]
    assert manifest["acceptance"] == old["acceptance"] == report["acceptance"]
    assert [each["limit"] for each in manifest["acceptance"]["checks"]] == ["MAX_DROP=10dB"]
    assert manifest["rebuilt"]["from"] == {key: old["engine"][key] for key in ("backend", "version", "targets")}
    assert any(line.startswith("engine built again from a package of tensorrt_rtx 1.") for line in report["warnings"])
    assert cli.main(["rebuild", str(package), "--target", "tensorrt_rtx", "--sm", "89"]) == 0  # and once more
    assert told(package)[0]["engine"] == old["engine"]


def test_a_gpu_host_builds_runs_and_may_serve_it(package, tmp_path, api_of, monkeypatch, capsys):
    gpu_host(monkeypatch, api_of("11.4"))
    there = tmp_path / "there"
    assert cli.main(["rebuild", str(package), "--max-batch", "8", "--to", str(there)]) == 0
    assert "engine run on Made-up GPU: " in capsys.readouterr().out
    manifest, report = told(there)
    assert (manifest["engine"]["backend"], manifest["engine"]["targets"]) == ("tensorrt", ["SM89"])
    for found in (manifest["engine"], report["engine"]):
        assert found["executed"]
        assert found["fidelity"]["count"] == 8
    assert [each["dtype"] for each in manifest["io"]["inputs"]] == ["float16"]
    assert [each[which][0] for which in ("min", "opt", "max") for each in manifest["io"]["outputs"]] == [1, 2, 8]
    assert file_faults(there) == file_faults(package) == []
    assert cli.main(["report", str(there)]) == 0
    page = there.with_name("there.report.html").read_text()
    assert "python -m deploy rebuild PACKAGE --target tensorrt --max-batch 8" in page


def test_a_processor_gets_an_engine_of_its_own(package, tmp_path, capsys):
    there = tmp_path / "there"
    assert cli.main(["rebuild", str(package), "--target", "onnxruntime", "--to", str(there)]) == 0
    manifest, _ = told(there)
    assert manifest["engine"]["executed"]
    assert [each["dtype"] for kind in ("inputs", "outputs") for each in manifest["io"][kind]] == ["float32"] * 2
    assert cli.main(["preflight", str(there), "--cpu", *ALLOW]) == 0
    assert cli.main(["verify", str(there)]) == 0
    assert "engine run: model.engine reaches" in capsys.readouterr().out


def test_a_package_that_is_not_whole_is_refused(package, capsys):
    (package / "golden.npz").write_bytes(b"changed")
    before = contents(package)
    assert cli.main(["rebuild", str(package), "--target", "tensorrt_rtx"]) == 2
    assert "is not sound (golden.npz has changed since it was built" in capsys.readouterr().err
    assert contents(package) == before


def test_a_package_whose_graph_gives_other_outputs_is_refused(package, capsys):
    with np.load(package / "golden.npz") as arrays:
        changed = {**arrays, "images": arrays["images"][:, :, ::-1].copy()}
    np.savez(package / "golden.npz", **changed)
    manifest, _ = told(package)
    manifest["files"]["golden.npz"]["sha256"] = file_sha256(package / "golden.npz")
    (package / "manifest.json").write_text(json.dumps(manifest))
    assert cli.main(["verify", str(package)]) == cli.EXIT_FAILED
    capsys.readouterr()
    assert cli.main(["rebuild", str(package), "--target", "tensorrt_rtx"]) == 2
    assert "is not sound (model.fp32.onnx reaches" in capsys.readouterr().err


def test_another_package_that_comes_meanwhile_does_not_mix_with_it(package, tmp_path, monkeypatch):
    """What is written is all of the package that was there when the build began."""
    before = contents(package)

    def build(backend, *arguments):
        shutil.move(package, tmp_path / "old")
        shutil.copytree(tmp_path / "old", package)
        (package / "model.onnx").write_bytes(b"another network's")
        return backend.build(*arguments)

    monkeypatch.setattr("deploy.serve.rebuild.build_apart", build)
    assert cli.main(["rebuild", str(package), "--target", "tensorrt_rtx", "--sm", "89"]) == 0
    after = contents(package)
    assert {name: after[name] for name in STAY} == {name: before[name] for name in STAY}
    assert verify_package(package) == []


def test_what_a_killed_run_displaced_is_put_back_first(package, monkeypatch):
    package.rename(package.with_name(".package.old-999999"))
    assert cli.main(["rebuild", str(package), "--target", "onnxruntime"]) == 0
    monkeypatch.chdir(package)
    assert cli.main(["rebuild", ".", "--target", "onnxruntime", "--to", f"{package}/../package"]) == 0
    assert verify_package(package) == []
    assert [path.name for path in package.parent.iterdir() if path.name.startswith(".package.old")] == []


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("manifest.json", {"task": "boxes"}, "'boxes' is NoneType and the task 'boxes'"),
        ("manifest.json", {"task": "pictures"}, "names the task 'pictures', which its outputs are not"),
        ("report.json", {"bytes": 3}, "has no table 'bytes'"),
    ],
)
def test_a_package_that_tells_something_else_is_one_line(package, capsys, file, changes, said):
    content = json.loads((package / file).read_text()) | changes
    (package / file).write_text(json.dumps(content))
    manifest, _ = told(package)
    if file != "manifest.json":
        manifest["files"][file]["sha256"] = file_sha256(package / file)
        (package / "manifest.json").write_text(json.dumps(manifest))
    assert cli.main(["rebuild", str(package), "--target", "onnxruntime"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--target", "tensorrt"], "TARGET=tensorrt cannot build here"),
        (["--target", "tensorrt_rtx", "--sm", "90"], "TensorRT-RTX has no target SM90"),
        (["--target", "tensorrt_rtx", "--batch", "9"], "batch profile 1/9/4: expected 1 <= BATCH <= MAX_BATCH"),
        (["--target", "tensorrt_rtx", "--to", "INSIDE"], "lie in each other: expected a folder beside it"),
        (["--target", "tensorrt_rtx", "--to", ""], "--to is empty"),
        (
            ["--target", "tensorrt_rtx", "--to", "/dev/null/x"],
            "cannot be written (File exists): choose another with --to",
        ),
        (["--target", "tensorrt_rtx", "--to", "n" * 250], "cannot be written (File name too long)"),
        (["--target", "tensorrt_rtx", "--to", "IN THE WAY"], "is not a package (no manifest.json of ours in it)"),
    ],
)
def test_what_cannot_be_built_is_one_line_and_changes_nothing(package, tmp_path, capsys, options, said):
    (tmp_path / "in the way").mkdir()
    (tmp_path / "in the way/file").write_text("mine")
    before = contents(package)
    places = {"IN THE WAY": tmp_path / "in the way", "INSIDE": package / "inner"}
    options = [str(places.get(each, each)) for each in options]
    assert cli.main(["rebuild", str(package), *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert contents(package) == before
    assert (tmp_path / "in the way/file").read_text() == "mine"


def test_an_engine_that_computes_something_else_is_no_package(package, api_of, monkeypatch, capsys):
    gpu_host(monkeypatch, api_of("10.12"), outputs=np.zeros_like)
    before = contents(package)
    assert cli.main(["rebuild", str(package), "--target", "tensorrt"]) == cli.EXIT_FAILED
    assert "failed: the engine reaches 0.0 dB on the golden images" in capsys.readouterr().err
    assert contents(package) == before


def test_a_package_that_failed_stays_one(package, tmp_path, capsys):
    manifest, _ = told(package)
    manifest["acceptance"] = {
        "accepted": False,
        "checks": [{"limit": "MAX_DROP=99dB", "kept": False, "measured": "33 dB"}],
    }
    (package / "manifest.json").write_text(json.dumps(manifest))
    there, good = tmp_path / "there", contents(package)
    shutil.copytree(package, there)
    assert cli.main(["rebuild", str(package), "--target", "onnxruntime", "--to", str(there)]) == cli.EXIT_FAILED
    beside = tmp_path / "there.not-accepted"
    assert f"{beside}: not to be served: MAX_DROP=99dB: 33 dB" in capsys.readouterr().err
    assert told(beside)[0]["servable"] is False
    assert contents(there) == good
    assert cli.main(["rebuild", str(beside), "--target", "onnxruntime"]) == cli.EXIT_FAILED  # in its place
    assert told(beside)[1]["rebuilt"]["from"]["backend"] == "onnxruntime"


def test_lost_int8_is_no_package(package, monkeypatch, capsys):
    def blind(*given):
        return replace(audit.audit(*given), lost=("blocks.1.mlp.fc1/MatMul",))

    monkeypatch.setattr("deploy.proven.audit", blind)
    before = contents(package)
    assert cli.main(["rebuild", str(package), "--target", "tensorrt_rtx"]) == cli.EXIT_FAILED
    assert "1 of 24 planned layers do not run in an INT8 kernel" in capsys.readouterr().err
    assert contents(package) == before
    assert (package.parent / "package.engine_layers.json").is_file()
