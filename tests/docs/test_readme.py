"""The figures in README and docs are those of benchmarks/results, each table at one commit."""

import copy
import json

import pytest

from benchmarks import readme
from benchmarks.readme import (
    BLOCKS,
    RESULTS,
    as_its_task_judges,
    commits_differ,
    cpu_speed_table,
    int8_layers,
    judged_on,
    recipe_reports,
    recipes_table,
    rendered,
    reports,
    results_table,
    sqnr,
    tasks_table,
)
from deploy.report.proof import PLANNED_ONLY
from tests.docs.pages import ROOT

REPORTS = reports()
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("file", BLOCKS)
def test_figures_are_those_of_the_results_files(file):
    text = (ROOT / file).read_text()
    assert rendered(file, text) == text, "run `python -m benchmarks.readme`"


@pytest.mark.parametrize("file", BLOCKS)
def test_a_page_with_a_missing_block_is_refused(file):
    name = next(iter(BLOCKS[file]))
    with pytest.raises(ValueError, match=f"{file} has 0 places for '{name}'"):
        rendered(file, "nothing here")


def test_the_readme_fits_two_screens():
    assert len(README.splitlines()) <= 120


def test_the_number_of_networks_is_that_of_the_result():
    intake = json.loads((RESULTS / "intake.json").read_text())
    assert intake["complete"]
    assert f"({intake['with_places_and_blocks']} of the {intake['tried']} tried, " in README


def test_the_first_command_is_shown_with_its_real_output():
    report = REPORTS[readme.SHOWN]
    assert f"SQNR {report['fidelity']['sqnr_db']:.1f} dB" in README
    assert f"{report['engine']['int8_gemms']} INT8 GEMMs" in README


def test_results_say_where_they_come_from():
    for report in recipe_reports().values():
        assert report["commit"]
        assert not report["commit"].endswith("-dirty")
        assert report["machine"]["processor"]
        assert report["command"].startswith("make ")


def test_every_report_of_a_recipe_is_in_the_table_of_recipes():
    files = {path.name for path in RESULTS.glob("*.int8*.json")}
    assert recipe_reports().keys() == files


def test_reports_of_one_commit_make_a_table():
    assert commits_differ("results", {}) is None
    assert commits_differ("results", {"a.json": {"commit": "1"}, "b.json": {"commit": "1"}}) is None


def test_reports_of_two_commits_are_refused_by_file_name():
    shown = {"a.json": {"commit": "1"}, "b.json": {"commit": "2"}, "c.json": {"commit": "1"}}
    reason = commits_differ("results", shown)
    assert reason is not None
    assert "table 'results' would mix 2 commits (1: a.json, c.json; 2: b.json)" in reason


@pytest.fixture
def two_reports(monkeypatch, tmp_path):
    """A README of its own with the table of two reports, which a test may change."""
    found = {name: copy.deepcopy(report) | {"commit": "1"} for name, report in REPORTS.items()}
    blocks = {"README.md": {"results": (lambda: found, results_table, True)}}
    monkeypatch.setattr(readme, "BLOCKS", blocks)
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("<!-- results -->\nold\n<!-- /results -->\n")
    return found


def test_the_command_writes_the_tables(two_reports, tmp_path):
    assert readme.main() == 0
    text = (tmp_path / "README.md").read_text()
    assert "old" not in text
    assert "at commit 1 on" in text
    assert all(f"| {report['model']} |" in text for report in two_reports.values())


def test_the_command_writes_nothing_where_commits_differ(two_reports, tmp_path, capsys):
    first, second = list(two_reports)[:2]
    two_reports[second]["commit"] = "2"
    assert readme.main() == 1
    assert "old" in (tmp_path / "README.md").read_text()
    said = capsys.readouterr().err
    assert first in said
    assert second in said
    assert said.endswith("nothing was written\n")


def test_an_interval_is_shown_where_it_was_measured():
    fidelity = {"sqnr_db": 29.17, "count": 128}
    assert (sqnr(fidelity), judged_on(fidelity)) == ("29.2 dB", "128 images")
    measured = fidelity | {"sqnr_interval_db": [27.94, 30.61], "sources": 4}
    assert (sqnr(measured), judged_on(measured)) == ("29.2 dB (27.9 to 30.6)", "128 images of 4 sources")


@pytest.mark.parametrize("table", [results_table, recipes_table])
def test_a_table_explains_its_intervals(table):
    found = copy.deepcopy(REPORTS)
    for report in found.values():
        report["fidelity"] |= {"sqnr_interval_db": None, "sources": None}
    assert "interval" not in table(found)
    found[readme.SHOWN]["fidelity"] |= {"sqnr_db": 29.21, "sqnr_interval_db": [27.94, 30.61], "sources": 4}
    assert "29.2 dB (27.9 to 30.6) | 128 images of 4 sources |" in table(found)
    assert table(found).endswith("In brackets: the interval over source images.")


def test_convolutions_of_tensorrt_rtx_are_planned_and_no_more():
    engine = {"backend": PLANNED_ONLY, "planned": 51, "lost": [], "int8_convs": 51}
    assert int8_layers(engine) == "0 of 51 proven, 51 planned"
    assert int8_layers(engine, {"fc": "it costs much"}) == "0 of 51 proven, 51 planned, 1 kept in FP16"
    assert int8_layers(engine | {"backend": "tensorrt"}) == "51 of 51 proven"
    assert int8_layers(engine | {"int8_convs": 0, "lost": ["fc"]}) == "50 of 51 proven"


FIDELITY = {
    "psnr_db": None,
    "ssim": None,
    "boxes": None,
    "top1_agreement": None,
    "top1_kind": "classes",
    "cosine": 0.99912,
}


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ({"psnr_db": 43.66, "ssim": 0.99012}, "PSNR 43.7 dB, SSIM 0.9901"),
        ({"boxes": 144, "ap": 0.951, "ap50": 0.989, "lost": 0, "moved_px": 0.71},
         "AP 0.951, at overlap .5 0.989; 0 lost, the others moved by 0.7 pixels (median), of 144"),
        ({"top1_agreement": 0.937, "top1_kind": "nearest neighbour"}, "cosine 0.9991, nearest neighbour 93.7%"),
        ({}, "cosine 0.9991"),
    ],
)  # fmt: skip
def test_a_row_is_judged_by_its_task(measured, expected):
    assert as_its_task_judges(FIDELITY | measured) == expected


def test_the_table_of_tasks_names_its_command():
    report = copy.deepcopy(REPORTS[readme.SHOWN]) | {"network": "net", "commit": "1"}
    report["fidelity"] |= FIDELITY | {"cosine": 0.5}
    limit = {"acceptance": {"checks": [{"limit": "MAX_DROP=42dB"}]}}
    text = tasks_table({"net.int8": report | {"acceptance": {"checks": []}}, "net.int8.42dB": report | limit})
    assert "| net | `int8` | " in text
    assert "| net | `int8`, `MAX_DROP=42dB` | " in text
    assert "| cosine 0.5000 |" in text
    assert "Measured by `python -m benchmarks.task_engines` at commit 1 on" in text


def test_the_tables_of_cpu_speed_have_published_ratios_where_there_are_some():
    pair = {"ratio": 2.104, "low": 2.0, "high": 2.2}
    row = {
        "model": "net-random-weights", "recipe": "int8", "threads": 1, "batch": 1, "published": 1.5, "agreement_db": 142.5,
        "ratios": {"float/plain": pair, "float/integer": pair | {"ratio": 2.5}, "float/other": pair, "other/integer": pair},
    }  # fmt: skip
    result = {"rows": [row], "machine": {"cores": 2, "processor": "P"}, "command": "c", "commit": "1"}
    first, second = cpu_speed_table({"a.json": result, "b.json": result | {"rows": [row | {"published": None}]}}).split(
        "Measured by `c` at commit 1 on 2 cores (P)."
    )[:2]
    assert (
        "| net | `int8` | 1 | 1 | 1.50 | 2.50 (2.00 to 2.20) | 2.10 (2.00 to 2.20) | 2.10 (2.00 to 2.20) | 142 dB |"
        in first
    )
    assert (
        "| network | recipe | threads | batch | this tool | this tool, graph with Q/DQ | other | agreement of our graphs |"
        in second
    )


def test_no_table_mixes_commits_and_that_of_tasks_no_network_s(monkeypatch):
    assert readme.refusals() == []
    found = {f"{network}.{recipe}": {"network": network, "commit": "1"} for network in "ab" for recipe in ("x", "y")}
    found["b.y"]["commit"] = "2"
    monkeypatch.setattr(readme, "task_reports", lambda: found)
    (reason,) = readme.refusals()
    assert reason.startswith("table 'tasks, b' would mix 2 commits (1: b.x; 2: b.y)")
    found["b.x"]["commit"] = "2"
    assert readme.refusals() == []
