"""The README says what is true: its figures are those of benchmarks/results, its links and commands exist."""

import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
REPORTS = {
    path.name.split(".")[0]: json.loads(path.read_text()) for path in (ROOT / "benchmarks/results").glob("*.int8.json")
}


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_every_make_command_exists():
    named = set(re.findall(r"`?make ([a-z-]+)", README))
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


@pytest.mark.parametrize("model", sorted(REPORTS))
def test_the_figures_are_those_of_the_results_file(model):
    """A table row `| model | ... |` holds SQNR, agreement, speed, kernels, engine size as the results file has them."""
    report = REPORTS[model]
    (row,) = [line for line in README.splitlines() if line.startswith(f"| {model} |")]
    fidelity, engine = report["fidelity"], report["engine"]
    for figure in (
        f"{fidelity['sqnr_db']:.1f} dB",
        f"{fidelity['top1_agreement']:.1%}",
        f"{report['speed']['ort_cpu_ratio']:.2f}x",
        f"{engine['kernels']}",
        f"{engine['bytes'] / 1e6:.1f} MB",
        f"{report['seconds']['total']:.0f} s",
    ):
        assert figure in row, figure


def test_the_shown_output_is_that_of_the_results_file():
    report = REPORTS["dinov2_s"]
    for figure in (
        f"SQNR {report['fidelity']['sqnr_db']:.1f} dB",
        f"{report['engine']['int8_gemms']} INT8 GEMMs",
        f"{report['speed']['ort_cpu_ratio']:.2f}x float",
        f"{report['seconds']['total']:.0f} s",
    ):
        assert figure in README, figure


def test_the_results_say_where_they_come_from():
    for report in REPORTS.values():
        assert report["commit"]
        assert not report["commit"].endswith("-dirty")
        assert report["machine"]["processor"]
        assert report["command"].startswith("make ")
