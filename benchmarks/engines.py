"""`make bench`: build the reference models and keep the reports in benchmarks/results/.

    python -m benchmarks.engines                        all of RUNS
    python -m benchmarks.engines dinov2_s.int8_qwt      some of them

Every figure in the README comes from these files (`benchmarks/readme.py` puts them there). Each run has a process of
its own, so that its peak memory is its own. Runs of the default recipe calibrate anew, for their time; the others
may use the cache.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DEFAULT = "int8"
RECIPES = {
    "dinov2_s": (
        DEFAULT, "int8_erq", "int8_qwt", "int8_plain_qwt", "int8_plain_qwt_shared", "int8_attention", "int8_attention_all",
    ),
    "mobilenetv2": (DEFAULT, "int8_erq", "int8_qwt_all"),
}  # fmt: skip
RUNS = tuple(f"{model}.{recipe}" for model, recipes in RECIPES.items() for recipe in recipes)


def run(name: str) -> dict[str, Any]:
    """Build `<model>.<recipe>` in a scratch folder; the report."""
    model, recipe = name.split(".")
    with tempfile.TemporaryDirectory() as out:
        options = {"model": model, "recipe": recipe, "out": out, "cache": "off" if recipe == DEFAULT else "on"}
        command = [sys.executable, "-m", "deploy", "engine", "--json"]
        command += [part for name, value in options.items() for part in (f"--{name}", value)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout) | {"command": f"make bench (make engine MODEL={model} RECIPE={recipe})"}


def main(names: list[str]) -> int:
    """Make the runs of these names, or all."""
    if unknown := [name for name in names if name not in RUNS]:
        print(f"unknown run '{unknown[0]}': expected some of {', '.join(RUNS)}", file=sys.stderr)
        return 2
    reports = {name: run(name) for name in names or RUNS}
    for name, report in reports.items():  # only now, so that the checkout they describe was clean
        (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
