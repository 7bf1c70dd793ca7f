"""`make table` on a network that takes seconds: rows, figures, interruption, ImageNet's layout, bad input."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.tables import __main__ as tables
from benchmarks.tables import table
from calib.images.image_set import image_sets
from calib.images.preprocess import preprocessing_from_config
from calib.network.fold import fold_affine
from calib.network.qdq import quantized_net
from calib.precision import Precision
from calib.quant_model import QuantModel
from calib.scales.calibrate import Config as CalibrateConfig
from calib.scales.calibrate import calibrate
from calib.weights.load import LoadedNet, NoWeightsError, state_sha256
from deploy import cli, stages
from tests.tiny import SIZE, rounded, tiny_model, tiny_net

CONFIG = {
    "input_size": (3, SIZE, SIZE), "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center",
    "mean": (0.5,) * 3, "std": (0.5,) * 3,
}  # fmt: skip
PAPER = """
title = "A paper"
source = "table 7"
notes = ["a remark"]
models = ["vit_s", "vit_b"]
float = [81.39, 84.54]
[published."4/4"]
"Theirs" = [65.05, "-"]
[ours]
"max" = { bits = ["4/4", "6/32"], calibrate = { observer = "max" } }
"max + gptq" = { bits = ["4/4"], calibrate = { observer = "max" }, method = { name = "gptq" } }
[[not_run]]
network = "A detector"
where = "table 8"
figures = ["MB", "AP"]
why = "needs data"
rows = [["32/32", "float", 12.5, 40.0], ["8/8", "Theirs", "-", 39.5]]
"""
COUNTS = ["--calib-images", "16", "--eval-images", "8"]


@pytest.fixture
def paper(tmp_path, monkeypatch):
    """The file of a small paper; networks are tiny ones, cache and results lie in `tmp_path`."""

    def load(spec):
        net = tiny_net("vit", seed=len(spec.name))
        return LoadedNet(net, f"tiny {spec.name}", state_sha256(net), True, CONFIG)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(table, "load_net", load)
    monkeypatch.setattr(table, "RESULTS", tmp_path / "results")
    path = tmp_path / "paper.toml"
    path.write_text(PAPER)
    return path


def run(paper, *options):
    return tables.main(["--paper", str(paper), *COUNTS, *options])


def result_of(paper):
    return json.loads((paper.parent / "results/table.paper.json").read_text())


def test_rows_hold_figures_settings_and_where_they_come_from(paper, capsys):
    assert run(paper, "--models", "vit_s deit_s") == 0
    result = result_of(paper)
    assert [(row["model"], row["bits"], row["method"]) for row in result["rows"]] == [
        (model, *row)
        for model in ("vit_s", "deit_s")
        for row in [("4/4", "max"), ("4/4", "max + gptq"), ("6/32", "max")]
    ]
    for row in result["rows"]:
        assert {"sqnr_db", "cosine", "top1_agreement"} <= row["fidelity"].keys()
        assert row["fidelity"]["count"] == 8
        assert row["seconds"] == pytest.approx(sum(stage["seconds"] for stage in row["stages"]), abs=0.01)
        assert row["recipe"]["precision"]["first_last"] == 8
        assert {"commit", "date"} <= row.keys()
    assert result["models"]["vit_s"]["calibration"]["count"] == 16
    assert {"machine", "commit", "command", "published"} <= result.keys()
    assert f"PAPER={paper} MODELS=vit_s,deit_s CALIB_IMAGES=16 EVAL_IMAGES=8" in result["command"]
    shown = capsys.readouterr().out
    for text in ("A paper", "Theirs", "65.05", "max + gptq", " dB ", "published: table 7", "a remark", "written to",
                 "A detector, table 8", "39.5", "published, not run: needs data"):  # fmt: skip
        assert text in shown
    weights_only, both = (
        next(row["fidelity"]["sqnr_db"] for row in result["rows"] if row["bits"] == bits) for bits in ("6/32", "4/4")
    )
    assert weights_only > both + 6


def test_a_row_is_what_the_stages_give_by_hand(paper):
    assert run(paper, "--models", "vit_s") == 0
    row = result_of(paper)["rows"][0]
    calibration, evaluation = image_sets(None, None, preprocessing_from_config(CONFIG), 16, 8)
    halves = stages.halves_of(calibration, lambda part: [torch.from_numpy(batch) for batch in part.batches(16)])
    tiny = tiny_model("vit", seed=len("vit_s"))
    model = QuantModel.of("tiny", tiny.net, precision=Precision(4, 4, 8))
    model = calibrate(fold_affine(model, next(iter(halves[0]))[:1]), halves, CalibrateConfig("max"))
    model = rounded(model, halves)
    (images,) = evaluation.batches(8)
    with torch.no_grad():
        exact, output = (net(torch.from_numpy(images)).double() for net in (model.float_net, quantized_net(model)))
    expected = 10 * torch.log10(exact.square().sum() / (output - exact).square().sum())
    assert row["fidelity"]["sqnr_db"] == pytest.approx(float(expected), abs=1e-3)


def test_an_interrupted_table_goes_on_where_it_stopped(paper, monkeypatch, capsys):
    measured = []
    measure = table.Bench.measure

    def stop_at_second(bench, experiment, watch):
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(experiment.method)
        return measure(bench, experiment, watch)

    monkeypatch.setattr(table.Bench, "measure", stop_at_second)
    assert run(paper, "--models", "vit_s") == cli.EXIT_INTERRUPTED
    assert "finished rows are stored" in capsys.readouterr().err
    assert not (paper.parent / "results").exists()

    def count(bench, experiment, watch):
        measured.append(f"{experiment.bits} {experiment.method}")
        return measure(bench, experiment, watch)

    monkeypatch.setattr(table.Bench, "measure", count)
    assert run(paper, "--models", "vit_s") == 0
    assert measured[1:] == ["4/4 max + gptq", "6/32 max"]
    first = result_of(paper)
    assert run(paper, "--models", "vit_s") == 0
    assert len(measured) == 3
    assert result_of(paper)["rows"] == first["rows"]
    assert run(paper, "--models", "vit_s", "--cache", "off") == 0
    assert len(measured) == 6
    assert run(paper, "--models", "vit_s", "--eval-images", "9") == 0
    assert len(measured) == 9, "other images are other rows"


def test_a_recipe_is_measured_once_under_whatever_name(paper, monkeypatch):
    assert run(paper, "--models", "vit_s") == 0
    rows = result_of(paper)["rows"]
    paper.write_text(PAPER.replace('"max + gptq"', '"columns"'))
    monkeypatch.setattr(table.Bench, "measure", None)
    assert run(paper, "--models", "vit_s") == 0
    again = result_of(paper)["rows"]
    assert [row["method"] for row in again] == ["max", "columns", "max"]
    assert [row["recipe"]["name"] for row in again] == ["max", "columns", "max"]
    assert [row["fidelity"] for row in again] == [row["fidelity"] for row in rows]


def test_a_cache_that_cannot_be_written_costs_only_the_keeping(paper, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert run(paper, "--models", "vit_s") == 0
    assert len(result_of(paper)["rows"]) == 3
    assert "not kept: " in capsys.readouterr().err


def test_a_damaged_row_is_measured_anew(paper):
    assert run(paper, "--models", "vit_s") == 0
    rows = result_of(paper)["rows"]
    for kept in (paper.parent / "cache").rglob("*.json"):
        kept.write_text('{"model": ')
    assert run(paper, "--models", "vit_s") == 0
    assert [row["fidelity"] for row in result_of(paper)["rows"]] == [row["fidelity"] for row in rows]


def imagenet(folder, classes=("0", "7"), parts=("train", "val")):
    generator = np.random.default_rng(0)
    for part in parts:
        for name in classes:
            (folder / part / name).mkdir(parents=True)
            for index in range(4):
                pixels = generator.integers(0, 256, (40, 50, 3), np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{index}.png")
    return folder


def test_with_imagenet_rows_are_accuracies_on_the_papers_networks(paper, tmp_path, capsys):
    root = imagenet(tmp_path / "imagenet")
    assert run(paper, "--imagenet", str(root)) == 0
    result = result_of(paper)
    assert list(result["models"]) == ["vit_s", "vit_b"]
    for row in result["rows"]:
        assert 0 <= row["fidelity"]["top1"] <= 1
        assert row["fidelity"]["reference_top1"] is not None
    shown = capsys.readouterr().out
    assert " dB " not in shown.replace("in dB and", "")
    assert shown.count("32/32") == 3, "the float networks of the paper, those not run among them, and ours"


def test_networks_out_of_reach_are_left_out_unless_they_were_named(paper, tmp_path, monkeypatch, capsys):
    root = imagenet(tmp_path / "imagenet", parts=("calib", "val"))
    load = table.load_net

    def only_vit_b(spec):
        if spec.name != "vit_b":
            raise table.UserError(f"the hub does not have {spec.name}")
        return load(spec)

    monkeypatch.setattr(table, "load_net", only_vit_b)
    assert run(paper, "--imagenet", str(root)) == 0
    assert list(result_of(paper)["models"]) == ["vit_b"]
    assert "vit_s left out: the hub does not have vit_s" in capsys.readouterr().err
    assert run(paper, "--imagenet", str(root), "--models", "vit_s,vit_b") == cli.EXIT_USER_ERROR
    monkeypatch.setattr(table, "load_net", lambda spec: only_vit_b(table.resolve_model("vit_s")) or spec)
    assert run(paper, "--imagenet", str(root)) == cli.EXIT_USER_ERROR
    assert capsys.readouterr().err.splitlines()[-1] == "error: the hub does not have vit_s"


BAD = {
    "paper": (["--paper", "qwtt"], r"unknown PAPER 'qwtt': expected adaq, adaq_cases, erq, qwt.* Did you mean 'qwt'?"),
    "model": (["--models", "vit_bb"], "Unknown model 'vit_bb'"),
    "one model of two": (["--models", "vit_s,vit_bb"], "Did you mean 'vit_b'"),
    "no such folder": (["--imagenet", "/nowhere"], "IMAGENET='/nowhere': expected a folder with val/ and train/"),
    "two sources": (["--imagenet", "/data", "--calib", "/mine"], "IMAGENET= brings its own images: expected it alone"),
    "counts": (["--eval-images", "0"], "'0': expected a whole number of 1 or more"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2_before_anything_is_loaded(paper, capsys, monkeypatch, case):
    monkeypatch.setattr(table, "load_net", None)
    options, expected = BAD[case]
    assert run(paper, *options) == cli.EXIT_USER_ERROR
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert re.search(expected, line)
    assert not (paper.parent / "results").exists()
    assert not (paper.parent / "cache/int8-engine/table").exists(), "nothing was measured before"


def test_folders_of_images_take_the_place_of_the_samples(paper, tmp_path):
    colours = np.random.default_rng(0).integers(0, 255, (12, 40, 50, 3), dtype=np.uint8)
    for index, image in enumerate(colours):
        folder = tmp_path / ("mine" if index < 9 else "theirs")
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{index}.png")
    folders = ["--calib", str(tmp_path / "mine"), "--eval", str(tmp_path / "theirs")]
    assert tables.main(["--paper", str(paper), "--models", "vit_s", *folders]) == 0
    result = result_of(paper)
    seen = {name: result["models"]["vit_s"][name] for name in ("calibration", "evaluation")}
    assert {name: found["count"] for name, found in seen.items()} == {"calibration": 9, "evaluation": 3}
    assert str(tmp_path / "mine") in seen["calibration"]["source"]
    assert f"CALIB={tmp_path}/mine EVAL={tmp_path}/theirs MODELS=vit_s" in result["command"]
    assert run(paper, "--models", "vit_s", *folders[:2], "--calib-images", "6", "--eval-images", "2") == 0
    counts = [result_of(paper)["models"]["vit_s"][name]["count"] for name in ("calibration", "evaluation")]
    assert counts == [6, 2], "without EVAL some of CALIB are held out"


def test_a_folder_that_does_not_exist_is_one_line(paper, capsys):
    assert run(paper, "--models", "vit_s", "--calib", "/nowhere") == cli.EXIT_USER_ERROR
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: calibration path '/nowhere' does not exist")
    assert not (paper.parent / "results").exists()


def test_imagenet_without_classes_is_refused(paper, tmp_path, capsys):
    root = tmp_path / "imagenet"
    for part in ("train", "val"):
        (root / part).mkdir(parents=True)
        for index in range(4):
            Image.fromarray(np.full((40, 50, 3), 40 * index + len(part), np.uint8)).save(root / part / f"{index}.png")
    assert run(paper, "--imagenet", str(root)) == cli.EXIT_USER_ERROR
    assert "val/ names no classes" in capsys.readouterr().err


def test_a_stage_that_a_network_cannot_have_is_one_line(paper, monkeypatch, capsys):
    def refuse(*_):
        raise table.UserError("no attention here")

    monkeypatch.setattr(stages, "calibrate", refuse)
    assert run(paper, "--models", "vit_s") == 0
    assert all(row["fidelity"] is None for row in result_of(paper)["rows"])
    assert "no attention here" in capsys.readouterr().out


def test_weights_that_cannot_be_had_are_told_with_what_this_command_can_do(paper, monkeypatch, capsys):
    def unreachable(_spec):
        raise NoWeightsError("the hub is away")

    monkeypatch.setattr(table, "load_net", unreachable)
    assert run(paper, "--models", "swin_t") == cli.EXIT_USER_ERROR
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: the hub is away: choose others with MODELS=, such as dinov2_s,mobilenetv2")
    assert "WEIGHTS=" not in said
