"""`make coverage`: takes the tool's own networks and the smallest of every architecture file of timm through the pipeline.

    python -m benchmarks.coverage                 short names and the `PER_FILE` smallest of every file; goes on where it
                                                  was interrupted
    python -m benchmarks.coverage 'vit_*' resnet18   those that match, by pattern; figures of others stay
    python -m benchmarks.coverage --intake-only   the structure of every architecture alone (benchmarks/intake.py)

Weights are random and images few: what is tried is tracing, the proofs, export, parity layer by layer, building with
TensorRT-RTX and the audit, not accuracy. As many networks as there are cores, at most `WORKERS`, run side by side, with
one thread of torch each.

Writes `results/coverage.json`: for every network the layers planned and found in INT8, kernels, the difference of simulation
and graph, seconds, or the line that says why there is no package; and docs/coverage.md, the same as a table.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import intake
from calib.weights.zoo import ZOO
from deploy import host
from deploy.report.evidence import tool_commit

ROOT = Path(__file__).parents[1]
RESULT, PAGE = ROOT / "benchmarks/results/coverage.json", ROOT / "docs/coverage.md"
PER_FILE = 2
TIMEOUT_S = 1800  # super-resolution of 128 x 128 pictures takes most
CALIBRATED, JUDGED, CROP = 16, 8, 256  # images, and their side in pixels
WORKERS = 4  # a large network takes some 5 GB
OPTIONS = (
    "--weights", "random", "--recipe", "int8_plain", "--target", "tensorrt_rtx", "--sm", "89", "--batch", "1",
    "--max-batch", "4", "--cache", "off",
)  # fmt: skip
ADVICE = "give FLOAT=fp32"
INTAKE_ONLY = "--intake-only"
INTRODUCTION = """# Networks that were tried

Written by `make coverage` from [coverage.json](../benchmarks/results/coverage.json): {green} of {tried} networks reached a
verified package{rest}. Chosen are the tool's short names at full size and the {per_file} smallest networks of every file of
timm. Weights are random, images few and the recipe `int8_plain`: this is about structure, not accuracy. INT8 layers found
are those that TensorRT-RTX has an INT8 kernel for (GEMMs), or plans in INT8 (convolutions). Nothing was run on a GPU.
Where FP16 cannot hold what these random weights compute, the types beside INT8 are FP32 (`FLOAT=fp32`).
Measured at commit {commits}, on {machine}.

| network | INT8 layers planned | INT8 GEMMs | planned INT8 convolutions | fused attention | kernels | seconds |
|---|---:|---:|---:|---:|---:|---:|
"""
COLUMNS = ("planned", "int8_gemms", "int8_convs", "fused_attention", "kernels", "seconds")


def smallest() -> list[str]:
    """Return the `PER_FILE` architectures with fewest parameters of every file of timm, in alphabetic order."""
    import timm
    from timm.models._registry import model_entrypoint

    by_file: dict[str, list[tuple[int, str]]] = {}
    for name in timm.list_models():
        if (size := intake.parameters(name)) is not None:
            by_file.setdefault(model_entrypoint(name).__module__, []).append((size, name))
    return sorted(name for found in by_file.values() for _, name in sorted(found)[:PER_FILE])


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """Return what a row shows of a package's report."""
    engine, parity = report["engine"], report["parity"]
    return {
        "planned": engine["planned"], "int8_gemms": engine["int8_gemms"], "int8_convs": engine["int8_convs"],
        "fused_attention": engine["fused_attention"], "kernels": engine["kernels"],
        "in_float": len(report["float_layers"]), "parity": parity["torch_vs_ort_rel_l2"],
    }  # fmt: skip


def write_images(folder: Path) -> list[str]:
    """Write a few crops of photographs to calibrate on and to judge on; returns the options that take them.

    The tool's own sample judges on 128 images, which is most of the time of a small network.
    """
    from skimage import data

    generator, photographs = np.random.default_rng(0), (data.astronaut(), data.coffee(), data.cat())
    options = []
    for role, count in (("calib", CALIBRATED), ("eval", JUDGED)):
        crops = []
        for number in range(count):
            photograph = photographs[number % len(photographs)]
            top, left = (int(generator.integers(0, size - CROP + 1)) for size in photograph.shape[:2])
            crops.append(photograph[top : top + CROP, left : left + CROP])
        np.save(folder / f"{role}.npy", np.stack(crops))
        options += [f"--{role}", str(folder / f"{role}.npy")]
    return options


def _last(said: str) -> str:
    """Return the last line of what a run said, with single spaces."""
    return " ".join((said.strip().splitlines() or ["nothing"])[-1].split())[:300]


def taken(name: str, floats: str = "fp16") -> dict[str, Any]:
    """Return the row of one network: figures of its package, or the reason why there is none.

    One whose values FP16 cannot hold, as random weights have it, is built with FP32 types beside INT8, as the tool advises.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        options = [*OPTIONS, *write_images(Path(folder)), "--float", floats, "--json", "--out", folder]
        command = [sys.executable, "-m", "deploy", "engine", "--model", name, *options]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S, cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        except subprocess.TimeoutExpired as late:
            return {"reason": f"no package within {TIMEOUT_S} s; told last: {_last((late.stderr or b'').decode())}"}
    seconds = round(time.perf_counter() - start, 1)
    if done.returncode == 0:
        try:
            return {**figures(json.loads(done.stdout)), "floats": floats, "seconds": seconds}
        except json.JSONDecodeError:
            return {"reason": f"printed no JSON: {done.stdout[:200]!r}", "bug": True, "seconds": seconds}
    reason = _last(done.stderr)
    if floats == "fp16" and ADVICE in reason:
        return taken(name, "fp32")
    if done.returncode < 0:
        reason = f"killed by {signal.Signals(-done.returncode).name}; told last: {reason}"
    return {"reason": reason, "bug": done.returncode not in (1, 2), "seconds": seconds}


def page(report: dict[str, Any]) -> str:
    """docs/coverage.md: a table of all rows of `report`, then the reasons of those without a package."""
    rows, machine = report["networks"], report["machine"]
    rest = "" if report["complete"] else f" so far, of {report['chosen']}"
    commits = ", ".join(dict.fromkeys(str(row["commit"]) for row in rows.values()))
    head = INTRODUCTION.format(
        green=report["green"], tried=report["tried"], rest=rest, per_file=PER_FILE, commits=commits,
        machine=f"{machine['cores']} cores ({machine['processor']})",
    )  # fmt: skip
    note = {"fp32": " (`FLOAT=fp32`)"}
    green = [
        f"| {name}{note.get(row.get('floats'), '')} | {' | '.join(str(row[column]) for column in COLUMNS)} |"
        for name, row in rows.items()
        if "reason" not in row
    ]
    others = [f"- {name}: {row['reason']}" for name, row in rows.items() if "reason" in row]
    return head + "\n".join([*green, *(["", "Without a package:", "", *others] if others else []), ""])


def write(rows: dict[str, dict[str, Any]], chosen: Sequence[str], commit: str | None) -> dict[str, Any]:
    """Write `results/coverage.json` and docs/coverage.md; returns the former."""
    green = sum("reason" not in row for row in rows.values())
    report = {
        "networks": dict(sorted(rows.items())),
        "chosen": len(chosen), "tried": len(rows), "green": green, "complete": all(name in rows for name in chosen),
        "reasons": Counter(row["reason"][:100] for row in rows.values() if "reason" in row),
        "machine": host.describe(), "commit": commit, "command": "make coverage",
    }  # fmt: skip
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    PAGE.write_text(page(report))
    return report


def main(patterns: Sequence[str]) -> int:
    """Take the networks that match `patterns`, or the tool's own and the smallest of every file; returns the exit code."""
    if patterns and patterns[0] == INTAKE_ONLY:
        return intake.main(patterns[1:])
    import timm

    known = dict.fromkeys([*ZOO, *timm.list_models()])  # a short name may be timm's
    chosen = [n for n in known if any(fnmatch(n, p) for p in patterns)] if patterns else [*ZOO, *smallest()]
    if not chosen:
        print(
            f"no network matches {', '.join(patterns)}: expected short names or architectures of timm", file=sys.stderr
        )
        return 2
    commit = tool_commit()
    before = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    goes_on = before.get("commit") == commit and not before.get("complete")
    rows = before["networks"] if before and (patterns or goes_on) else {}
    left = [name for name in chosen if patterns or name not in rows]
    report = write(rows, chosen, commit)
    with ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1)) as pool:
        runs = {pool.submit(taken, name): name for name in left}
        try:
            for run in as_completed(runs):
                name = runs[run]
                rows[name] = {**run.result(), "commit": commit}
                report = write(rows, chosen, commit)
                print(f"{report['tried']}/{len(chosen)} {name}: {json.dumps(rows[name])}", flush=True)
        except BaseException:  # without waiting for all that is left
            pool.shutdown(cancel_futures=True)
            raise
    print(f"{report['green']} of {report['tried']} networks reached a verified package")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
