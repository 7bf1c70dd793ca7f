"""The README says what is true: its figures are those of benchmarks/results, its links and commands exist."""

import re
import subprocess
from pathlib import Path

from benchmarks.readme import rendered, reports

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
REPORTS = reports()


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_every_make_command_exists():
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", README, re.MULTILINE))
    assert {"engine", "test", "doctor"} <= named
    assert named <= make_targets()


def test_every_file_it_names_exists():
    named = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r"`([\w/]+\.(?:py|toml|md|txt))`", README)
    assert named
    missing = [name for name in named if "://" not in name and not (ROOT / name).exists()]
    assert missing == []


def test_make_help_lists_every_target():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in make_targets():
        assert re.search(rf"^{target}\b", shown, re.MULTILINE), target


def test_ci_runs_the_readmes_test_command():
    assert "make test" in README
    assert "make test" in (ROOT / ".ci/run").read_text()


def test_its_figures_are_those_of_the_results_files():
    assert rendered(README) == README, "run `python -m benchmarks.readme`"


def test_the_first_command_is_shown_with_its_real_output():
    report = REPORTS["dinov2_s"]
    assert f"SQNR {report['fidelity']['sqnr_db']:.1f} dB" in README
    assert f"{report['engine']['int8_gemms']} INT8 GEMMs" in README


def test_the_results_say_where_they_come_from():
    for report in REPORTS.values():
        assert report["commit"]
        assert not report["commit"].endswith("-dirty")
        assert report["machine"]["processor"]
        assert report["command"].startswith("make ")
