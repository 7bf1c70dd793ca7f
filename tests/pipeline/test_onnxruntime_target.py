"""The whole way on a host without a GPU: the engine is a graph of ONNX Runtime, and it is run where it is built."""

import json

import numpy as np
import pytest

from deploy import cli
from deploy.engine.packaged import runner_of_package
from deploy.verify import verify_package

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    command = ["engine", "--model", "test_vit", "--weights", "random", "--recipe", "int8_qwt", "--calib-images", "16"]
    assert cli.main([*command, "--cache", "off", "--target", "onnxruntime", "--out", str(out)]) == 0
    return out / "test_vit-random-weights/int8_qwt"


def test_it_is_built_run_and_proven_here(package):
    report = json.loads((package / "report.json").read_text())
    engine = report["engine"]
    assert engine["backend"] == "onnxruntime"
    assert engine["executed"]
    assert engine["device"] == report["machine"]["processor"]
    assert engine["lost"] == []
    assert engine["planned"] == engine["int8_gemms"] >= 24
    assert engine["fidelity"]["sqnr_db"] == pytest.approx(report["fidelity"]["sqnr_db"], abs=3)
    assert engine["traffic"]["mb_per_image"] is None
    tensors = json.loads((package / "manifest.json").read_text())["io"]
    assert [each["dtype"] for kind in ("inputs", "outputs") for each in tensors[kind]] == ["float32", "float32"]
    assert verify_package(package) == []


def test_the_engine_of_the_package_gives_its_golden_outputs(package):
    golden = np.load(package / "golden.npz")
    with runner_of_package(package) as run:
        found = run({"input": golden["images"]})["output"]
    simulated = golden["simulated_output"]
    assert np.square(found - simulated).mean() < 1e-2 * np.square(simulated).mean()


def test_explain_says_that_it_has_nothing_to_explain(package, capsys):
    assert cli.main(["explain", str(package)]) == 2
    said = capsys.readouterr().err
    assert "do not tell what they read and write: expected an engine of TARGET=tensorrt or tensorrt_rtx" in said
    assert said.count("\n") == 1
