"""Limits that are kept, that layers go back to FP16 for, and that nothing keeps: exit code, place and what is said."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from deploy import cli
from deploy.serve.preflight import Allowed, promise_faults
from deploy.serve.shipped import shipped_from_package

pytestmark = pytest.mark.slow

COMMAND = [
    "engine", "--model", "test_vit", "--weights", "random", "--calib-images", "32", "--target", "onnxruntime",
]  # fmt: skip
MODEL = "test_vit-random-weights"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder of packages, the first of them without limits, with a cache of its own."""
    folder, images = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for index in range(96):  # all of one kind, so that calibration images tell what others will show
        Image.fromarray(generator.integers(0, 256, (24, 24, 3), np.uint8)).save(images / f"{index}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("tests.pipeline.test_acceptance.COMMAND", [*COMMAND, "--calib", str(images)])
        assert cli.main([*COMMAND, "--out", str(folder)]) == 0
        yield folder


def read(folder, name="report.json"):
    return json.loads((folder / name).read_text())


def test_without_limits_a_package_is_accepted(out):
    assert read(out / MODEL / "int8")["acceptance"] == {"accepted": True, "checks": []}
    assert shipped_from_package(out / MODEL / "int8").failed == ()


def test_layers_go_back_to_fp16_until_the_limit_is_kept(out, tmp_path, capsys):
    plain = read(out / MODEL / "int8")
    limit = f"{plain['fidelity']['sqnr_db'] + 0.7:.1f}dB"
    assert cli.main([*COMMAND, "--max-drop", limit, "--min-speedup", "0.001", "--out", str(tmp_path)]) == 0
    report, manifest = (read(tmp_path / MODEL / "int8", name) for name in ("report.json", "manifest.json"))
    assert report["acceptance"]["accepted"]
    assert [check["limit"] for check in report["acceptance"]["checks"]] == [f"MAX_DROP={limit}", "MIN_SPEEDUP=0.001"]
    assert manifest["acceptance"] == report["acceptance"]
    back = {name for name, why in report["kept_float"].items() if why == f"back in FP16 to keep MAX_DROP={limit}"}
    assert back
    assert {*back} <= {*report["float_layers"]}
    assert report["engine"]["planned"] == plain["engine"]["planned"] - len(back)
    assert report["fidelity"]["sqnr_db"] > plain["fidelity"]["sqnr_db"]
    assert f"--max-drop {limit}" in report["command"]
    assert "PASS: SQNR" in capsys.readouterr().out


def test_a_package_that_keeps_no_limit_lies_beside_the_one_that_was_there(out, capsys):
    good = out / MODEL / "int8"
    before = (good / "manifest.json").read_bytes()
    for _ in range(2):  # the second replaces the first
        assert cli.main([*COMMAND, "--max-drop", "150dB", "--min-speedup", "900", "--out", str(out)]) == cli.EXIT_FAILED
    failed = capsys.readouterr().err.strip().splitlines()[-2:]
    bad = out / MODEL / "int8.not-accepted"
    assert failed[0].startswith("failed: MAX_DROP=150dB: SQNR ")
    assert failed[1].startswith("failed: MIN_SPEEDUP=900: ")
    assert all(line.endswith(f"; not to be served: '{bad}'") for line in failed)
    assert (good / "manifest.json").read_bytes() == before
    assert {path.name for path in (out / MODEL).iterdir()} == {"int8", "int8.not-accepted"}
    assert not read(bad, "manifest.json")["servable"]
    assert read(bad)["engine"]["planned"] > 0, "half of the work stays INT8"
    shipped = shipped_from_package(bad)
    allowed = Allowed(random_weights=True, sample_calibration=True, unexecuted=True)
    assert [fault.partition(": ")[0] for fault in promise_faults(shipped, allowed, cpu=True)] == [
        "it does not keep the limits that it was built for"
    ] * 2
    assert cli.main(["verify", str(bad)]) == cli.EXIT_FAILED
    assert "not to be served: MAX_DROP=150dB" in capsys.readouterr().err


def test_a_limit_that_cannot_be_measured_is_refused_before_anything_is_done(tmp_path, capsys):
    for given, said in (
        (["--max-drop", "1"], "MAX_DROP='1': expected 1% (of top-1 results or average precision) or 30dB"),
        (["--min-speedup", "fast"], "MIN_SPEEDUP='fast': expected a number above 0"),
    ):
        assert cli.main([*COMMAND, *given, "--out", str(tmp_path)]) == cli.EXIT_USER_ERROR
        assert said in capsys.readouterr().err
    rtx = [*COMMAND[:-1], "tensorrt_rtx", "--min-speedup", "2", "--out", str(tmp_path)]
    assert cli.main(rtx) == cli.EXIT_USER_ERROR
    assert not list(tmp_path.iterdir())


def test_verify_runs_the_engine_where_it_can(out, tmp_path, capsys):
    import shutil

    import onnx
    from onnx import numpy_helper

    from calib.store.digests import file_sha256

    package = tmp_path / "int8"
    shutil.copytree(out / MODEL / "int8", package)
    assert cli.main(["verify", str(package)]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"^engine run: model.engine reaches [0-9.]+ dB on the golden images where model.fp32.onnx", said, re.M
    )
    engine = onnx.load(package / "model.engine")  # of this backend it is a graph: its scales become wrong
    scales = [each for each in engine.graph.initializer if each.data_type == onnx.TensorProto.FLOAT and not each.dims]
    for scale in scales:
        scale.CopyFrom(numpy_helper.from_array(np.float32(50) * numpy_helper.to_array(scale), scale.name))
    onnx.save(engine, package / "model.engine")
    manifest = read(package, "manifest.json")
    manifest["files"]["model.engine"]["sha256"] = file_sha256(package / "model.engine")
    (package / "manifest.json").write_text(json.dumps(manifest))
    assert cli.main(["verify", str(package)]) == cli.EXIT_FAILED
    assert re.search(r"model.engine reaches -?[0-9.]+ dB .*: expected at least", capsys.readouterr().err)
