"""`python -m benchmarks.killed_runs`: `make engine` killed at random moments (SIGKILL, all its processes), and run again.

    python -m benchmarks.killed_runs                       # 30 moments, timm's test_vit with random weights
    python -m benchmarks.killed_runs --times 5 --model mobilenetv2

The next run has to write the files that two runs write that nobody disturbed, and to leave nothing else behind. Before every
second kill an older package lies at the place; it has to be whole after the kill. Every kill begins with an empty cache, and
the run after it goes on with what was kept there. Writes `results/killed_runs.json`; ends with exit code 1 if a run did not
make it good.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from calib.errors import UserError
from calib.store.digests import file_sha256
from deploy import host
from deploy.cli import Parser, answered
from deploy.package import FILES, package_folder
from deploy.report.evidence import tool_commit
from deploy.verify import file_faults

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/killed_runs.json"
OPTIONS = ("--weights", "random", "--calib-images", "64", "--target", "tensorrt_rtx", "--sm", "89")


class Place:
    """A folder with an output folder and a cache of its own; `command` writes the package there."""

    def __init__(self, folder: Path, model: str) -> None:
        self.out, self.cache = folder / "out", folder / "cache"
        self.cache.mkdir(parents=True)
        self.final = package_folder(str(self.out), model, None, "random", "int8")
        self.command = [
            sys.executable, "-m", "deploy", "engine", "--model", model, *OPTIONS, "--out", str(self.out),
        ]  # fmt: skip

    def start(self) -> "subprocess.Popen[str]":
        """A run, as the leader of its processes."""
        return subprocess.Popen(
            self.command, cwd=ROOT, env=os.environ | {"XDG_CACHE_HOME": str(self.cache)}, start_new_session=True,
            text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    def written(self) -> float:
        """Run to the end; returns seconds. Raises UserError with the last line of a run that fails."""
        start, run = time.monotonic(), self.start()
        _, said = run.communicate()
        if run.returncode != 0:
            raise UserError(f"a run ended with exit code {run.returncode}: {(said.strip().splitlines() or [''])[-1]}")
        return time.monotonic() - start

    def digests(self) -> dict[str, str]:
        """sha256 by file of the package."""
        return {name: file_sha256(self.final / name) for name in FILES}

    def left_over(self) -> list[str]:
        """What lies beside the package."""
        return sorted(path.name for path in self.final.parent.iterdir() if path != self.final)


def killed(place: Place, seconds: float) -> str:
    """Kill a run after so many seconds; returns the last stage that it told of, "ended" if it was done before."""
    run = place.start()
    with suppress(subprocess.TimeoutExpired):
        run.wait(seconds)
    ended = run.poll() is not None
    with suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
    _, said = run.communicate()
    stages = [line.split()[0] for line in said.splitlines() if line.startswith("  ") and line[2:3].isalpha()]
    return "ended" if ended else (stages or ["before the first stage"])[-1]


def trial(folder: Path, model: str, seconds: float, older: Path | None, expected: dict[str, str]) -> dict[str, Any]:
    """The row of one kill. `expected`: sha256 of the files that do not differ between runs."""
    place = Place(folder, model)
    if older is not None:
        place.final.parent.mkdir(parents=True)
        shutil.copytree(older, place.final)
    stage = killed(place, seconds)
    there = place.final.exists()
    whole = not file_faults(place.final) if there else older is None
    place.written()
    found = place.digests()
    return {
        "killed_after_s": round(seconds, 2), "last_stage": stage, "older_package": older is not None,
        "whole_or_absent": whole, "same_files": all(found[name] == digest for name, digest in expected.items()),
        "whole_again": not file_faults(place.final), "left_over": place.left_over(),
    }  # fmt: skip


def good(row: dict[str, Any]) -> bool:
    """Whether nothing was lost and the next run made the same package."""
    return row["whole_or_absent"] and row["same_files"] and row["whole_again"] and not row["left_over"]


def main(argv: Sequence[str] | None = None) -> int:
    """Kill runs; returns the exit code."""
    parser = Parser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=30, help="how many runs are killed (default 30)")
    parser.add_argument("--model", default="test_vit", help="network, with random weights (default test_vit)")
    args = parser.parse_args(argv)
    moments, rows = random.Random(0), []
    with tempfile.TemporaryDirectory() as temporary:
        undisturbed = [Place(Path(temporary) / str(index), args.model) for index in range(2)]
        seconds = max(place.written() for place in undisturbed)
        first, second = (place.digests() for place in undisturbed)
        expected = {name: digest for name, digest in first.items() if second[name] == digest}
        for index in range(args.times):
            folder = Path(temporary) / "killed"
            older = undisturbed[0].final if index % 2 else None
            rows.append(trial(folder, args.model, moments.uniform(0, seconds), older, expected))
            print(json.dumps(rows[-1]), flush=True)
            shutil.rmtree(folder)
    report = {
        "model": args.model, "recipe": "int8", "undisturbed_s": round(seconds, 1), "same_in_every_run": sorted(expected),
        "killed": len(rows), "made_good": sum(map(good, rows)), "rows": rows,
        "machine": host.describe(), "commit": tool_commit(),
        "command": f"python -m benchmarks.killed_runs --times {args.times} --model {args.model}",
    }  # fmt: skip
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{report['made_good']} of {report['killed']} kills were made good by the next run")
    return 0 if all(map(good, rows)) else 1


if __name__ == "__main__":
    sys.exit(answered(main))
