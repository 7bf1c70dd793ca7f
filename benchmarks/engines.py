"""`make bench`: builds the reference models and stores their reports in benchmarks/results/.

    python -m benchmarks.engines                        all of RUNS
    python -m benchmarks.engines dinov2_s.int8_qwt      some of them

Every figure in the README comes from these files (`benchmarks/readme.py` writes them there). Each run is a process, so that
peak memory is measured per run. Runs of the default recipe do not use the calibration cache, because the time of their
calibration is reported; the others may use it.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calib.errors import UserError
from deploy.cli import answered

RESULTS = Path(__file__).parent / "results"
DEFAULT = "int8"
FOR_CNN = (DEFAULT, "int8_erq", "int8_qwt_all", "int8_shortcuts")
RECIPES = {
    "dinov2_s": (
        DEFAULT, "int8_erq", "int8_qwt", "int8_plain_qwt", "int8_plain_qwt_shared", "int8_attention", "int8_attention_all",
        "int8_products",
    ),
    "mobilenetv2": FOR_CNN, "efficientnet_lite0": FOR_CNN, "resnet50_thin": FOR_CNN,
}  # fmt: skip
RUNS = tuple(f"{model}.{recipe}" for model, recipes in RECIPES.items() for recipe in recipes)


def engine_arguments(options: Mapping[str, str]) -> list[str]:
    """Return the arguments of `python -m deploy` that build a package with `options`; empty ones are left out."""
    return ["engine", *(part for name, value in options.items() if value for part in (f"--{name}", value))]


def built(options: Mapping[str, str]) -> dict[str, Any]:
    """Build the package of `make engine` with `options` (name of an option -> value) in a temporary folder; its report.

    Raises UserError if there is none; why is on stderr already.
    """
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "deploy", *engine_arguments({**options, "out": out}), "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(f"no package ({' '.join(f'{name}={value}' for name, value in options.items())}): see above")
    return dict(json.loads(done.stdout))


def run(name: str) -> dict[str, Any]:
    """Build `<model>.<recipe>` in a temporary folder and return the report."""
    model, recipe = name.split(".")
    report = built({"model": model, "recipe": recipe, "cache": "off" if recipe == DEFAULT else "on"})
    return report | {"command": f"make bench (make engine MODEL={model} RECIPE={recipe})"}


def main(names: list[str]) -> int:
    """Make the runs with these names, or all runs; returns the exit code."""
    if unknown := [name for name in names if name not in RUNS]:
        print(f"unknown run '{unknown[0]}': expected some of {', '.join(RUNS)}", file=sys.stderr)
        return 2
    reports = {name: run(name) for name in names or RUNS}
    for name, report in reports.items():  # after the last run: reports record whether the checkout was clean
        (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(answered(lambda: main(sys.argv[1:])))
