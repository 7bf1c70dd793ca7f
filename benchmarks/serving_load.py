"""`python -m benchmarks.serving_load PACKAGE ...`: a Triton server under load, without a GPU.

    make engine MODEL=dinov2_s
    make serve-repo MODEL=dinov2_s ALLOW=sample-calibration     # makes .venv-serve; make serve makes .venv-triton
    .venv-serve/bin/python -m benchmarks.serving_load artifacts/dinov2_s/int8

For every package, a server of its own serves the `_cpu` model:

- `EQUAL` images one by one over HTTP and again over gRPC: answers that are not ONNX Runtime's, bit for bit, are counted.
- `CLIENTS` clients at once, half of them over HTTP and half over gRPC, for `--seconds`: how many answers came, how many were
  wrong or lost, images per second, median and 99th percentile of the time to an answer.
- `--requests` requests of these clients, or as many as `MOST_SECONDS` give: by how much the memory of the server and its
  processes grows (resident set).

Clients and server share the cores of this machine. Writes `results/serving.json`; ends with exit code 1 if an answer was
wrong or lost.
"""

import argparse
import json
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from calib.errors import UserError
from deploy import host
from deploy.cli import Parser, answered
from deploy.measure.onnx_runner import OnnxRunner
from deploy.package import MODEL_FP32
from deploy.report.evidence import tool_commit
from deploy.serve.configs import CPU
from deploy.serve.preflight import Allowed
from deploy.serve.repository import write_repository
from deploy.serve.server import Server, running
from deploy.serve.shipped import Shipped, served_name, shipped_from_package

RESULT = Path(__file__).parent / "results/serving.json"
PROTOCOLS = ("http", "grpc")
EQUAL = 200
CLIENTS = 8
IMAGES = 16  # different ones under load
WARM_UP = 1000  # requests before memory counts, or those of so many seconds
WARM_UP_SECONDS, MOST_SECONDS = 20.0, 180.0

Outputs = dict[str, np.ndarray]
Ask = Callable[[np.ndarray], Outputs]


def asker(server: Server, protocol: str, model: str, shipped: Shipped) -> Ask:
    """A client of its own: images (B, 3, H, W) float32 -> outputs by name."""
    import tritonclient.grpc
    import tritonclient.http

    module = {"http": tritonclient.http, "grpc": tritonclient.grpc}[protocol]
    client = module.InferenceServerClient(getattr(server, protocol))

    def ask(images: np.ndarray) -> Outputs:
        tensor = module.InferInput(shipped.inputs[0].name, list(images.shape), "FP32")
        tensor.set_data_from_numpy(images)
        found = client.infer(model, [tensor])
        return {each.name: found.as_numpy(each.name) for each in shipped.outputs}

    return ask


def equal(found: Outputs, expected: Outputs) -> bool:
    """Whether all outputs are the same, bit for bit."""
    return found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in expected)


def resident_mb(process: int) -> float:
    """Memory (2^20 bytes) that a process and all its descendants hold: the sum of their resident sets."""
    parents, pages = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        parents[int(stat.parent.name)], pages[int(stat.parent.name)] = int(fields[1]), int(fields[21])
    family, new = {process}, {process}
    while new := {pid for pid, parent in parents.items() if parent in new} - family:
        family |= new
    return sum(pages.get(pid, 0) for pid in family) * resource.getpagesize() / 2**20


@dataclass
class Load:
    """What clients saw. `ms`: time to every right answer; `lost`: what a client said where none came."""

    ms: list[float] = field(default_factory=list)
    wrong: int = 0
    lost: list[str] = field(default_factory=list)

    def to_json(self, seconds: float) -> dict[str, Any]:
        """Plain values, of what took so many seconds."""
        p50, p99 = np.percentile(self.ms, [50, 99]) if self.ms else (np.nan, np.nan)
        return {
            "requests": len(self.ms) + self.wrong + len(self.lost),
            "wrong": self.wrong, "lost": len(self.lost), "reasons": sorted(set(self.lost))[:5],
            "seconds": round(seconds, 1), "images_s": round(len(self.ms) / seconds, 1),
            "p50_ms": round(float(p50), 2), "p99_ms": round(float(p99), 2),
        }  # fmt: skip


def load(
    askers: Sequence[Callable[[], Ask]], images: np.ndarray, expected: Sequence[Outputs], until: "Until"
) -> dict[str, Any]:
    """What happens when every client asks for one image after another, `until` it is over; each begins at another image.

    A client is made in the thread that uses it: Triton's HTTP client belongs to one.
    """

    def client(which: int) -> Load:
        seen, index, ask = Load(), which, askers[which]()
        while until.goes_on():
            index = (index + 1) % len(images)
            before = time.perf_counter()
            try:
                found = ask(images[index : index + 1])
            except Exception as error:  # whatever the client's library raises is an answer that did not come
                seen.lost.append(" ".join(str(error).split())[:200])
                continue
            ms = (time.perf_counter() - before) * 1e3
            if equal(found, expected[index]):
                seen.ms.append(ms)
            else:
                seen.wrong += 1
        return seen

    start = time.monotonic()
    with ThreadPoolExecutor(len(askers)) as pool:
        seen = list(pool.map(client, range(len(askers))))
    whole = Load(
        [ms for each in seen for ms in each.ms],
        sum(each.wrong for each in seen),
        [reason for each in seen for reason in each.lost],
    )
    return whole.to_json(time.monotonic() - start)


class Until:
    """Ends after so many `seconds`, or so many `requests` of all clients together, whichever comes first."""

    def __init__(self, seconds: float = float("inf"), requests: float = float("inf")) -> None:
        self.end, self.left, self.lock = time.monotonic() + seconds, requests, threading.Lock()

    def goes_on(self) -> bool:
        """Whether a client may send one more request."""
        with self.lock:
            self.left -= 1
            return self.left >= 0 and time.monotonic() < self.end


def measured(folder: Path, environment: Path, seconds: float, requests: int) -> dict[str, Any]:
    """The row of one package."""
    shipped = shipped_from_package(folder)
    if shipped.preprocessing is None:
        raise UserError(f"'{folder}' takes named inputs: expected packages of networks that take one image")
    name = served_name(shipped)
    runner = OnnxRunner(folder / MODEL_FP32)
    size = shipped.preprocessing.height, shipped.preprocessing.width
    images = np.random.default_rng(0).normal(size=(EQUAL, 3, *size)).astype(np.float32)
    expected = [runner.named_outputs(images[index : index + 1]) for index in range(EQUAL)]
    row: dict[str, Any] = {"model": shipped.model, "package": shipped.id, "input": f"3x{size[0]}x{size[1]}"}
    with tempfile.TemporaryDirectory() as temporary:
        write_repository([shipped], Path(temporary) / "models", name, Allowed(True, True, True))
        with running(environment, Path(temporary) / "models", [name + CPU]) as server:
            for protocol in PROTOCOLS:
                ask = asker(server, protocol, name + CPU, shipped)
                same = sum(equal(ask(images[at : at + 1]), expected[at]) for at in range(EQUAL))
                row[f"equal_over_{protocol}"] = f"{same} of {EQUAL}"
            askers = [partial(asker, server, PROTOCOLS[which % 2], name + CPU, shipped) for which in range(CLIENTS)]
            few = images[:IMAGES], expected[:IMAGES]
            row["load"] = {"clients": CLIENTS, **load(askers, *few, Until(seconds=seconds))}
            if requests:
                load(askers, *few, Until(WARM_UP_SECONDS, WARM_UP))
                before = resident_mb(server.process.pid)
                found = load(askers, *few, Until(MOST_SECONDS, requests))
                after = resident_mb(server.process.pid)
                memory = {"server_mb_before": round(before, 1), "server_mb_after": round(after, 1)}
                row["many"] = {**found, **memory, "growth_mb": round(after - before, 1)}
    return row


def holds(row: dict[str, Any]) -> bool:
    """Whether every answer came and was right."""
    loads = [row["load"], *([row["many"]] if "many" in row else [])]
    return all(row[f"equal_over_{protocol}"] == f"{EQUAL} of {EQUAL}" for protocol in PROTOCOLS) and not any(
        each["wrong"] or each["lost"] for each in loads
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all packages; returns the exit code."""
    parser = Parser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+", help="folders of packages")
    parser.add_argument("--environment", default=".venv-triton", help="where nvidia-pytriton is (default .venv-triton)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of load (default 60)")
    parser.add_argument(
        "--requests", type=int, default=0, help="over which the server's memory is watched (default none)"
    )
    args = parser.parse_args(argv)
    rows = []
    for folder in args.packages:
        rows.append(measured(Path(folder), Path(args.environment), args.seconds, args.requests))
        print(json.dumps(rows[-1]), flush=True)
        report = {
            "rows": rows, "machine": host.describe(), "commit": tool_commit(),
            "command": f"python -m benchmarks.serving_load {' '.join(args.packages)} --seconds {args.seconds:g} "
            f"--requests {args.requests}",
        }  # fmt: skip
        RESULT.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(map(holds, rows)) else 1


if __name__ == "__main__":
    sys.exit(answered(main))
