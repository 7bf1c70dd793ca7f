"""`python -m benchmarks.cpu_speed --name NAME PACKAGE..`: the float graph, INT8 and INT8 with integer kernels, on a CPU.

All three run in turn in ONNX Runtime on the golden images of a package, with one and with two threads. A package holds no
float graph, so the network is loaded again, and refused unless it has the weights that the package was made of.

With `--peer-python` the graphs run beside them that onnxruntime.quantization and ModelOpt (of that interpreter, see
requirements-peers.txt) make of the same float graph, with their default calibration, once with the products of attention in
INT8 and once without. ERQ's Table 9 is `--name erq --batch 1 --threads 1` on packages of its seven networks.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.float_twin import float_twin
from benchmarks.peers.judge import Network
from benchmarks.peers.quantizers import TOOLS
from benchmarks.peers.run import Inputs, peer_contenders, run
from calib.errors import UserError
from deploy import host
from deploy.bridge.export import export_float
from deploy.cli import Parser, answered
from deploy.measure.accuracy import mean_sqnr_db
from deploy.measure.integer_graph import integer_graph, integer_layers
from deploy.measure.latency import comparison, times_in_turn
from deploy.measure.onnx_runner import OnnxRunner
from deploy.package import GOLDEN, MANIFEST, MODEL_FP32, RANDOM, read_json
from deploy.report.evidence import tool_commit
from deploy.verify import golden_arrays, require_package

RESULTS = Path(__file__).parent / "results"
THREADS = (1, 2)
# float / W8A8 of ERQ's Table 9: ONNX on an Intel i5-10210U, one thread, one image
PUBLISHED = {
    "vit_s": 1.77, "vit_b": 1.68, "deit_t": 1.74, "deit_s": 1.54, "deit_b": 1.98, "swin_s": 1.55, "swin_b": 1.48,
}  # fmt: skip
FLOAT, PLAIN, INTEGER = "float", "plain", "integer"  # our graphs, in the order they run in


@dataclass(frozen=True)
class How:
    """How packages are measured. `batch`: images at a time, at most those of the package; None: all of them."""

    weights: str = "auto"
    rounds: int = 25
    threads: tuple[int, ...] = THREADS
    batch: int | None = None
    peer_python: str | None = None  # the interpreter that has the other tools; None: they are left out


def peer_graphs(folder: Path, images: np.ndarray, python: str) -> dict[str, Path]:
    """The graphs that other tools make of `folder`/float.onnx, by tool and setting; `images` (B, 3, H, W) calibrate them.

    Raises UserError for a tool that fails.
    """
    inputs, found = Inputs(folder), {}
    np.save(inputs.calibration, images)
    for contender in peer_contenders(inputs, folder, python):
        name = f"{contender.peer} {contender.setting}"
        if contender.setting.partition(",")[0] != TOOLS[contender.peer].calibrations[0]:
            continue
        if error := run(contender.command).error:
            raise UserError(f"{name}: {error}")
        found[name] = folder / contender.product
    return found


def ratios(times: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """`<baseline>/<candidate>` -> their comparison, of milliseconds (rounds,) per graph that were measured in turn.

    Every graph is compared with the float one, and that with integer kernels with every other.
    """
    pairs = [(FLOAT, other) for other in times if other != FLOAT]
    pairs += [(other, INTEGER) for other in times if other not in (FLOAT, INTEGER)]
    return {f"{one}/{other}": comparison(times[one], times[other]).to_json() for one, other in pairs}


def measure(folder: Path, how: How) -> list[dict[str, Any]]:
    """One row for each number of threads."""
    golden = golden_arrays(folder / GOLDEN)[0]
    if not isinstance(golden, np.ndarray):
        raise UserError(f"'{folder}' takes named inputs: expected a package of a network of images")
    images = np.ascontiguousarray(golden.astype(np.float32)[: how.batch])
    manifest = read_json(folder / MANIFEST)
    integer, written = integer_graph(folder / MODEL_FP32)
    with tempfile.TemporaryDirectory() as scratch:
        onnx.save(export_float(*float_twin(folder, how.weights)), Path(scratch) / "float.onnx")
        peers = peer_graphs(Path(scratch), golden.astype(np.float32), how.peer_python) if how.peer_python else {}
        graphs: dict[str, Any] = {
            FLOAT: Path(scratch) / "float.onnx", PLAIN: folder / MODEL_FP32, INTEGER: integer,
        }  # fmt: skip
        rows, published = [], PUBLISHED.get(manifest["model"].removesuffix(RANDOM))
        for threads in how.threads:
            runners: dict[str, Any] = {name: OnnxRunner(graph, threads=threads) for name, graph in graphs.items()}
            runners |= {name: Network(graph, threads) for name, graph in peers.items()}
            outputs = {name: runner(images) for name, runner in runners.items()}
            found = times_in_turn([lambda runner=runner: runner(images) for runner in runners.values()], how.rounds)  # type: ignore[misc]
            rows.append(
                {
                    "model": manifest["model"], "recipe": manifest["recipe"]["name"], "package_commit": manifest["commit"],
                    "threads": threads, "batch": len(images), "written": written,
                    "published": published if (threads, len(images)) == (1, 1) else None,
                    "notes": {name: runners[name].note for name in peers if runners[name].note},
                    "integer_layers": {PLAIN: integer_layers(graphs[PLAIN]), INTEGER: integer_layers(integer)},
                    "sqnr_db": {name: mean_sqnr_db(outputs[FLOAT], outputs[name]) for name in (PLAIN, INTEGER)},
                    "agreement_db": mean_sqnr_db(outputs[PLAIN], outputs[INTEGER]),
                    "ratios": ratios(dict(zip(runners, found.T, strict=True))),
                }
            )  # fmt: skip
    return rows


def line(row: Mapping[str, Any]) -> str:
    """A row of the table on the terminal."""
    found = "  ".join(
        f"{pair} {each['ratio']:.2f} ({each['low']:.2f} to {each['high']:.2f})" for pair, each in row["ratios"].items()
    )
    return f"{row['model']:20} {row['threads']} threads, batch {row['batch']}  {found}"


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options. Raises UserError for numbers below 1, a name with odd characters and files that are not there."""
    parser = Parser(prog="python -m benchmarks.cpu_speed", description=__doc__)
    parser.add_argument("--name", required=True, help="of the result: results/cpu_speed.NAME.json")
    parser.add_argument("packages", nargs="+", type=Path, metavar="PACKAGE", help="folder that make engine wrote")
    parser.add_argument("--weights", default=How.weights, help="weights of the packages, as in make engine")
    parser.add_argument("--rounds", type=int, default=How.rounds)
    parser.add_argument("--threads", type=int, nargs="+", default=How.threads, help="numbers of threads (default 1 2)")
    parser.add_argument("--batch", type=int, help="images at a time (default: all golden ones)")
    parser.add_argument("--peer-python", help="interpreter with the packages of requirements-peers.txt")
    options = parser.parse_args(arguments)
    if not re.fullmatch(r"\w+", options.name):
        raise UserError(f"--name {options.name}: expected letters, digits and _")
    batch = 1 if options.batch is None else options.batch
    counts = {"--rounds": [options.rounds], "--threads": options.threads, "--batch": [batch]}
    for name, values in counts.items():
        if min(values) < 1:
            raise UserError(f"{name} {min(values)}: expected 1 or more")
    if options.peer_python and not Path(options.peer_python).is_file():
        raise UserError(f"--peer-python {options.peer_python}: no such file; expected an interpreter")
    for folder in options.packages:
        require_package(folder)
    return options


def _main(arguments: Sequence[str]) -> int:
    options = parsed(arguments)
    how = How(options.weights, options.rounds, tuple(options.threads), options.batch, options.peer_python)
    rows = [row for folder in options.packages for row in measure(folder, how)]
    result = {
        "machine": host.describe(), "commit": tool_commit(), "rounds": how.rounds, "rows": rows,
        "command": f"python -m benchmarks.cpu_speed {' '.join(arguments)}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    (RESULTS / f"cpu_speed.{options.name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print("\n".join(line(row) for row in rows))
    return 0


def main(arguments: Sequence[str]) -> int:
    """Measure the packages, write `results/cpu_speed.<name>.json` and print a line for each row; the exit code."""
    return answered(lambda: _main(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
