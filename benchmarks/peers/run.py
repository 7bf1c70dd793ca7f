"""Compares other quantizers with this tool: the same float graph, the same images, in one run.

    python -m benchmarks.peers --peer-python .venv-peers/bin/python

Each quantization and each judgement is a process: peak memory is measured per process, and a crash is a row of the table.
"""

import argparse
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.peers.quantizers import NOT_INSTALLED, TOOLS, activation_products

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
OURS = "this tool"
MEMORY_SHARE = 0.9  # of the free memory: a tool that allocates more fails instead of exhausting the machine


@dataclass(frozen=True)
class Inputs:
    """The files that `benchmarks.peers.inputs` wrote."""

    folder: Path

    @property
    def float_model(self) -> Path:
        """The path of the float graph."""
        return self.folder / "float.onnx"

    @property
    def calibration(self) -> Path:
        """The path of the calibration images."""
        return self.folder / "calib.npy"

    @property
    def evaluation(self) -> Path:
        """The path of the evaluation images."""
        return self.folder / "eval.npy"

    @property
    def about(self) -> dict[str, Any]:
        """The origin of these files."""
        return json.loads((self.folder / "about.json").read_text())


@dataclass(frozen=True)
class Outcome:
    """The end of a process: exit code (negative: the signal that killed it), output, and peak memory in 10^6 bytes."""

    code: int
    stdout: str
    stderr: str
    peak_rss_mb: float

    @property
    def error(self) -> str | None:
        """None after success, else the signal or the last line on stderr."""
        if self.code == NOT_INSTALLED:
            return "not installed (pip install -r requirements-peers.txt)"
        if self.code < 0:
            return f"killed by {signal.Signals(-self.code).name}"
        lines = self.stderr.strip().splitlines() or [f"exit code {self.code}"]
        return lines[-1].strip() if self.code else None


@dataclass(frozen=True)
class Contender:
    """One way to quantize: a command that writes a file matching the pattern `product`.

    `read` makes {`version`, `seconds`, ...} of its stdout.
    """

    peer: str
    setting: str
    command: tuple[str, ...]
    product: str
    read: Callable[[str], dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One row of the table. `error` is the reason if later fields are None.

    `seconds`: from the float network to the quantized ONNX file. `peak_rss_mb`: largest resident set of the process, in
    10^6 bytes (for this tool of the whole pipeline, engine build and verification included). `fidelity`, `speed`: see
    deploy/measure/accuracy.py and deploy/measure/latency.py; `speed` compares with the float graph. `note`: options
    that ONNX Runtime needed to run the file.
    """

    peer: str
    setting: str
    peak_rss_mb: float
    error: str | None = None
    version: str | None = None
    seconds: float | None = None
    packages: dict[str, str] | None = None
    fidelity: dict[str, Any] | None = None
    speed: dict[str, Any] | None = None
    note: str | None = None


def run(command: Sequence[str]) -> Outcome:
    """Run `command` in the root of the repository, with a limit of its memory, and wait for it."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err)
        limit = int(psutil.virtual_memory().available * MEMORY_SHARE)
        resource.prlimit(process.pid, resource.RLIMIT_DATA, (limit, limit))
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        return Outcome(process.returncode, out.read(), err.read(), round(usage.ru_maxrss * 1024 / 1e6, 1))


def read_report(stdout: str) -> dict[str, Any]:
    """{`version`, `seconds`} of this tool, from the report it prints; `seconds` are those of all stages up to export."""
    report = json.loads(stdout)
    seconds = list(report["seconds"].values())
    exported = list(report["seconds"]).index("export")
    return {"version": report["commit"], "seconds": sum(seconds[: exported + 1])}


def read_last_line(stdout: str) -> dict[str, Any]:
    """The JSON in the last line of stdout; tools may print before it."""
    return json.loads(stdout.strip().splitlines()[-1])


def our_recipes() -> list[str]:
    """The names of the recipes that come with this tool."""
    return sorted(path.stem for path in (ROOT / "deploy/recipes").glob("*.toml"))


def our_contenders(model: str, recipes: Sequence[str], inputs: Inputs, folder: Path) -> Iterator[Contender]:
    """Yield this tool with each of `recipes`.

    It draws the same images by their seed instead of reading calib.npy: an array would hide which images are crops of the
    same source image.
    """
    images = str(inputs.about["calibration"]["count"])
    for recipe in recipes:
        command = (
            sys.executable, "-m", "deploy", "engine", "--model", model, "--recipe", recipe,
            "--calib-images", images, "--out", str(folder / recipe), "--json",
        )  # fmt: skip
        yield Contender(OURS, recipe, command, f"{recipe}/**/model.fp32.onnx", read_report)


def peer_contenders(inputs: Inputs, folder: Path, peer_python: str) -> Iterator[Contender]:
    """Yield every peer with every calibration; if the network has attention, also with attention left in float."""
    import onnx

    attention = bool(activation_products(onnx.load(inputs.float_model)))
    for name, tool in TOOLS.items():
        # ONNX Runtime is a requirement of this tool: the version that everything is judged with
        python = sys.executable if name == "onnxruntime" else peer_python
        for calibration in tool.calibrations:
            for linears_only in (False, True) if attention else (False,):
                setting = f"{calibration}, linears only" if linears_only else calibration
                product = f"{name}-{setting}.onnx".replace(", ", "-").replace(" ", "-")
                command = (
                    python, "-m", "benchmarks.peers.quantizers", name, calibration, str(inputs.float_model),
                    str(inputs.calibration), str(folder / product), *(["--linears-only"] if linears_only else []),
                )  # fmt: skip
                yield Contender(name, setting, command, product, read_last_line)


def measure(contender: Contender, inputs: Inputs, folder: Path) -> Row:
    """Let `contender` quantize into `folder`, and judge the file that it wrote."""
    done = run(contender.command)
    row = Row(contender.peer, contender.setting, done.peak_rss_mb, done.error)
    if row.error:
        return row
    row = replace(row, **contender.read(done.stdout))
    quantized = next(folder.glob(contender.product), None)
    if quantized is None:
        return replace(row, error="wrote no model")
    command = [sys.executable, "-m", "benchmarks.peers.judge", inputs.float_model, quantized, inputs.evaluation]
    judged = run([*map(str, command), "--task", str(inputs.about["task"])])
    if judged.error:
        return replace(row, error=f"ONNX Runtime cannot run its model: {judged.error}")
    return replace(row, **read_last_line(judged.stdout))


def _cells(row: Row) -> list[str]:
    head = [row.peer, row.setting, row.version or "-"]
    seconds = "-" if row.seconds is None else f"{row.seconds:.0f}"
    if row.fidelity is None or row.speed is None:
        return [*head, "-", "-", "-", "-", seconds, f"{row.peak_rss_mb:.0f}", "-"]
    kl = row.fidelity["kl"]
    return [
        *head,
        f"{row.fidelity['sqnr_db']:.1f}",
        f"{row.fidelity['cosine']:.4f}",
        f"{row.fidelity['top1_agreement']:.1%}",
        "-" if kl is None else f"{kl:.4f}",
        seconds,
        f"{row.peak_rss_mb:.0f}",
        f"{row.speed['ratio']:.2f}x",
    ]


def print_table(model: str, rows: Sequence[Row]) -> None:
    """Print the table on stdout, and below it the errors and notes."""
    console = Console(highlight=False, width=None if os.isatty(1) else 130)
    table = Table(title=f"{model}: INT8 against float in ONNX Runtime", title_justify="left")
    for name in ("peer", "setting", "version"):
        table.add_column(name)
    for name in ("SQNR dB", "cosine", "top-1 agr.", "KL nats", "s", "peak MB", "speed"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    console.print(table)
    for row in rows:
        if remark := row.error or row.note:
            console.print(f"{row.peer}, {row.setting}: {remark}", markup=False, soft_wrap=True)


def result_json(about: dict[str, Any], command: str, rows: Sequence[Row]) -> dict[str, Any]:
    """The content of `results/peers.<model>.json`."""
    return {
        **about,
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": [asdict(row) for row in rows],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description="other quantizers side by side")
    parser.add_argument("--models", nargs="+", default=["dinov2_s", "mobilenetv2"], metavar="MODEL")
    parser.add_argument(
        "--recipes",
        nargs="+",
        default=our_recipes(),
        choices=our_recipes(),
        metavar="RECIPE",
        help="of this tool (all)",
    )
    parser.add_argument("--calib-images", type=int, default=64)
    parser.add_argument("--eval-images", type=int, default=128)
    parser.add_argument(
        "--peer-python", type=Path, default=Path(sys.executable), help="interpreter with requirements-peers.txt"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every contender on every model, print the tables, then write the results; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    args = parser.parse_args(argv)
    if not args.peer_python.is_file():
        parser.error(f"--peer-python {args.peer_python}: no such file")
    peer_python = str(args.peer_python.absolute())  # not resolved: the interpreter of a virtual environment is a link
    results = {}
    for model in args.models:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            images = ["--calib-images", str(args.calib_images), "--eval-images", str(args.eval_images)]
            prepared = run([sys.executable, "-m", "benchmarks.peers.inputs", model, scratch, *images])
            if prepared.error:
                print(prepared.error, file=sys.stderr)
                return prepared.code
            inputs, rows = Inputs(folder), []
            ours = our_contenders(model, args.recipes, inputs, folder)
            for contender in [*ours, *peer_contenders(inputs, folder, peer_python)]:
                print(f"{model}: {contender.peer}, {contender.setting}", file=sys.stderr)
                rows.append(measure(contender, inputs, folder))
            command = shlex.join(["python", "-m", "benchmarks.peers", *argv])
            results[model] = result_json(inputs.about, command, rows)
        print_table(model, rows)
    for model, result in results.items():  # after the last run: results record whether the checkout was clean
        (RESULTS / f"peers.{model.replace('/', '_')}.json").write_text(json.dumps(result, indent=2) + "\n")
    return 0
