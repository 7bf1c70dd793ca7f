"""The first sentence is the worst thing that is known of a package. Oracle: the sentences typed here."""

import pytest

from deploy.pages.contents import read_contents
from deploy.pages.measured import fidelity_rows
from deploy.pages.verdict import BAD, CARE, GOOD, verdict
from tests.unit.deploy.pages.packages import CNN, QWT, manifest_of, read_report, write_package

NOT_RUN = {"executed": False, "not_executed": "no NVIDIA driver"}
ENGINE_DB = 27.04


def contents_of(folder, engine, random=False, sample=False, warnings=(), result=QWT):
    report = read_report(result)
    for key in ("executed", "not_executed"):
        report["engine"].pop(key, None)
    report["engine"] |= engine
    report["warnings"] = list(warnings)
    manifest = manifest_of(report)
    manifest["weights"]["random"] = random
    manifest["calibration"] = {**manifest["calibration"], "sample": sample}
    return read_contents(write_package(folder / "p", report, manifest=manifest))


def run_on_a_gpu():
    fidelity = read_report()["fidelity"] | {"sqnr_db": ENGINE_DB}
    return {"executed": True, "device": "NVIDIA L4", "fidelity": fidelity, "golden_sqnr_db": [ENGINE_DB]}


@pytest.mark.parametrize(
    ("engine", "given", "level", "begin"),
    [
        (run_on_a_gpu(), {"random": True, "sample": True}, BAD, "Never to be served: its weights are random"),
        (run_on_a_gpu(), {"sample": True}, BAD, "Not for production"),
        (NOT_RUN, {"sample": True}, BAD, "Not for production"),
        (NOT_RUN, {}, CARE, "Not yet run on a GPU"),
        ({}, {}, CARE, "Whether the engine was ever run is not recorded"),
        (
            run_on_a_gpu(),
            {"warnings": ["few images"]},
            CARE,
            "The engine was run and its accuracy measured; read the warnings",
        ),
        (run_on_a_gpu(), {}, GOOD, "The engine was run on a GPU"),
        (run_on_a_gpu() | {"backend": "onnxruntime"}, {}, GOOD, "The engine was run on a CPU"),
    ],
)
def test_the_headline_is_the_worst_that_is_known(tmp_path, engine, given, level, begin):
    found = verdict(contents_of(tmp_path, engine, **given))
    assert found.level == level
    assert found.headline.startswith(begin)


def test_an_engine_that_ran_has_figures_of_its_own(tmp_path):
    contents = contents_of(tmp_path, run_on_a_gpu())
    rows = {name: "".join(map(str, line)) for name, line in fidelity_rows(contents.report)}
    assert rows["SQNR of the engine on NVIDIA L4"].startswith("27.0 dB (95 %: ")
    found = verdict(contents)
    assert ("engine was run", ("yes, on NVIDIA L4",)) in found.points
    assert not any("engine's own outputs" in limit for limit in found.limits)


def test_planned_convolutions_and_sample_images_are_limits(tmp_path):
    limits = verdict(contents_of(tmp_path, NOT_RUN, result=CNN)).limits
    assert any(limit.startswith("Convolutions planned for INT8 may run in another type") for limit in limits)
    assert any("crops of a few photographs" in limit for limit in limits)


@pytest.mark.parametrize(("kept", "level"), [(True, GOOD), (False, BAD)])
def test_a_limit_that_is_not_kept_is_the_worst_there_is_but_random_weights(tmp_path, kept, level):
    report = read_report()
    report["engine"] |= run_on_a_gpu()
    report["warnings"] = []
    check = {"limit": "MAX_DROP=1%", "kept": kept, "measured": "0.50 % of the top-1 results differ"}
    report["acceptance"] = {"accepted": kept, "checks": [check]}
    manifest = manifest_of(report)
    manifest["calibration"] = {**manifest["calibration"], "sample": False}
    found = verdict(read_contents(write_package(tmp_path / "p", report, manifest=manifest)))
    assert found.level == level
    assert ("does not keep the limits" in found.headline) is not kept
    row = dict(found.points)["MAX_DROP=1%"]
    assert "".join(map(str, row)) == f"{'PASS' if kept else 'FAIL'}: 0.50 % of the top-1 results differ"
