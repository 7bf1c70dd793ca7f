"""What report.json and the table say of the repairs. Oracle: the figures typed here."""

import re
import subprocess
from types import SimpleNamespace

import pytest

from calib.images.image_set import ImageSet
from calib.images.preprocess import Preprocessing
from calib.outputs import Output
from calib.quant_model import StageRecord
from calib.task import Task
from deploy.package import MANIFEST, write_json
from deploy.recipe import load_recipe, recipe_from_tables
from deploy.report import evidence
from deploy.report.evidence import warnings, waterfall
from deploy.report.manifest import replaced
from deploy.report.terminal import _repairs

ERQ = StageRecord("erq", {}, sqnr_before_db=28.0, sqnr_after_db=29.25)
QWT = StageRecord("qwt", {}, sqnr_before_db=29.5, sqnr_after_db=29.4)
SILENT = StageRecord("calibrate", {})


def as_json(*records):
    return [record.to_json() for record in records]


def shown(branches, *records):
    engine = {"kernels": 12, "kernels_without_branches": 11, "bytes": 3_000_000, "bytes_without_branches": 1_500_000}
    return dict(_repairs({"history": as_json(*records), "branches": branches, "engine": engine}))


def test_the_waterfall_starts_at_the_first_judge_and_tells_what_each_step_brings():
    rounded, *steps = waterfall(as_json(SILENT, ERQ, QWT))
    assert (rounded["step"], rounded["sqnr_after_db"], rounded["gain_db"]) == ("rounded", 28.0, None)
    assert [step["step"] for step in steps] == ["erq", "qwt"]
    assert [step["gain_db"] for step in steps] == pytest.approx([1.25, -0.1])
    assert shown({}, SILENT, ERQ, QWT) == {
        "stages, on calibration images": "float -> rounded 28.0 dB -> erq +1.2 dB -> qwt -0.1 dB"
    }


def test_without_a_repair_there_is_no_row():
    assert waterfall(as_json(SILENT)) == []
    assert shown({}, SILENT) == {}


def test_the_branches_row_tells_forms_scores_and_costs():
    untrained = {"b.2": {"form": "dense", "bytes": 12}}
    found = {"b.0": {"form": "shared", "r2_cv": 0.19}, "b.1": {"form": "dense", "r2_cv": 0.02}} | untrained
    assert shown(found, QWT)["branches"] == (
        "shared x1, dense x2, R2 0.02 to 0.19 on held-out images; +1 kernels, +1.50 MB"
    )
    assert shown(untrained)["branches"] == "dense x1; +1 kernels, +1.50 MB"


SOUND_SPEED = SimpleNamespace(ratio=1.0, low=0.9, high=1.1)


def said(
    factory="",
    classifier=True,
    backend="tensorrt",
    planned=0,
    speed=SOUND_SPEED,
    recipe=None,
    half=True,
    beyond=None,
    **images,
):
    """The warnings of a run with such sets of images; everything else of it is sound."""
    plain = Preprocessing(8, 8, 8, 8, "bilinear", (0.5,) * 3, (0.5,) * 3)
    sets = {name: ImageSet("made up", plain, (), **images.get(name, {})) for name in ("calibration", "evaluation")}
    sound = SimpleNamespace(warnings=lambda: [])
    return warnings(
        SimpleNamespace(
            **sets, loaded=SimpleNamespace(random=False, warnings=()), spec=SimpleNamespace(factory=factory),
            outputs=(Output("output", (5,)),), task=Task("classifier" if classifier else "features"),
            planned=("layer",) * planned, backend=SimpleNamespace(NAME=backend), fp16_range=sound, coverage=sound,
            recipe=recipe or load_recipe("int8"), options=SimpleNamespace(half=half),
            verdict=SimpleNamespace(fidelity=SimpleNamespace(reference_top1=None, out_of_range=beyond)),
            speed=SimpleNamespace(integer_layers=0, comparison=speed, warnings=lambda: []), built=SimpleNamespace(notes=()),
        )
    )  # fmt: skip


def packaged(folder, weights="a", shape=(32, 3, 224, 224), backend="tensorrt"):
    manifest = {
        "weights": {"sha256": weights, "source": f"file {weights}.pt"},
        "io": {"inputs": [{"name": "images", "max": list(shape)}]},
        "engine": {"backend": backend},
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def test_a_package_of_the_same_name_and_other_content_is_told_before_it_goes(tmp_path):
    assert replaced(tmp_path, packaged(tmp_path)) == ()
    new = packaged(tmp_path, "b", (8, 3, 384, 384), "onnxruntime")
    packaged(tmp_path)
    assert replaced(tmp_path, new) == (
        "it replaces a package of other weights (file a.pt) and inputs (images 3x224x224) and target (tensorrt); "
        "another OUT= keeps both",
    )
    write_json(tmp_path / MANIFEST, {"weights": []})
    assert replaced(tmp_path, new) == ()
    assert replaced(tmp_path / "none", new) == ()


@pytest.mark.parametrize(("beyond", "warned"), [(None, False), (0.005, False), (0.4, True)])
def test_pictures_beyond_their_range_are_a_warning(beyond, warned):
    assert any("lie beyond 0..1" in each for each in said(beyond=beyond)) is warned


@pytest.mark.parametrize(("backend", "words"), [("onnxruntime", "the others cost time"), ("tensorrt", "says nothing")])
def test_a_slow_engine_for_a_cpu_is_a_warning(backend, words):
    found = said(backend=backend, planned=3, speed=SimpleNamespace(ratio=0.06, low=0.05, high=0.07))
    assert any("computes 0 of the 3 INT8 layers in integers" in each and words in each for each in found)
    assert any("slower than the float network on this CPU (0.06x)" in each for each in found) is (
        backend == "onnxruntime"
    )


def test_fp32_types_are_said():
    assert any("FP32 types beside INT8 (FLOAT=fp32)" in each for each in said(half=False))
    assert not any("FLOAT=fp32" in each for each in said())


def test_weights_of_fewer_bits_are_said():
    four = recipe_from_tables("w4", {"precision": {"weights": 4}}, "")
    assert any("rounded to 4 bits and stored as INT8" in each for each in said(recipe=four))
    assert not any("stored as INT8" in each for each in said())


def test_a_commit_is_dirty_by_the_tool_s_files_and_not_by_results_or_pages(tmp_path, monkeypatch):
    def git(*command):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True, capture_output=True)

    tool, page = tmp_path / "deploy/report/evidence.py", tmp_path / "docs/coverage.md"
    results = tmp_path / "benchmarks/results/a.json"
    for file in (tool, page, results):
        file.parent.mkdir(parents=True)
        file.write_text("1")
    monkeypatch.setattr(evidence, "__file__", str(tool))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert evidence.tool_commit() is None
    git("init", "--quiet")
    git("add", "-A")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "first")
    commit = evidence.tool_commit()
    assert re.fullmatch(r"[0-9a-f]{12}", commit)
    results.write_text("2")
    page.write_text("2")
    (tmp_path / "untracked").write_text("3")
    assert evidence.tool_commit() == commit
    tool.write_text("2")
    assert evidence.tool_commit() == f"{commit}-dirty"


def test_what_is_left_out_of_either_set_is_said_with_its_role():
    found = said(
        calibration={"duplicates": 3, "skipped": ("a.jpg",)}, evaluation={"other_pictures": ("b.heic",), "overlap": 2}
    )
    assert "calibration: 3 duplicates left out: the same content as another image" in found
    assert "calibration: 1 unreadable images skipped: a.jpg" in found
    assert "evaluation: 1 pictures of kinds that cannot be read, convert them: b.heic" in found
    assert "2 evaluation images left out: they, or their group, are calibration images" in found


def test_labels_that_are_not_used_are_told_with_what_a_factory_can_do():
    labels = {"evaluation": {"labels": (0, 1)}}
    assert any("set net.num_classes = 5 in the factory" in line for line in said("mine.py:build", False, **labels))
    assert any("of this network are features, not classes" in line for line in said("", False, **labels))
    assert not any("labels" in line for line in said("mine.py:build", True, **labels))
