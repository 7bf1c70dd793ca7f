"""A Triton server on this machine, on loopback and free ports: the one of the wheel nvidia-pytriton, without a GPU.

The wheel holds Triton 2.51 (container 24.10) with the Python backend alone: no TensorRT, no checksum agent. So it serves
the `_cpu` models of a repository; what it shows and what it does not is in docs/serving.md.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from calib.errors import UserError
from deploy.serve.bundle import require_unchanged
from deploy.serve.configs import CPU, JPEG

READY_SECONDS = 120.0  # a network of hundreds of MB, warmed up on a busy machine
STOP_SECONDS = 30.0  # it gives running requests 5 seconds


@dataclass(frozen=True)
class Server:
    """A running server. `http`, `grpc`, `metrics`: host:port; `log`: what it prints."""

    process: subprocess.Popen[bytes]
    http: str
    grpc: str
    metrics: str
    log: Path


def _free_ports(count: int) -> list[int]:
    """Ports that are free now. Another process can take one before the server does; then the server does not start."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _installed(environment: Path) -> Path:
    """The folder of the server in a virtual environment. Raises UserError if it is not installed there."""
    found = list(environment.glob("lib/python3.*/site-packages/pytriton/tritonserver"))
    if not found:
        raise UserError(
            f"no Triton server in the environment '{environment}': expected nvidia-pytriton; run make serve, which installs "
            f"requirements-triton.txt there"
        )
    return found[0]


def _python_of(environment: Path) -> str:
    """The Python version of the environment, such as "3.11"."""
    return next(environment.glob("lib/python3.*")).name.removeprefix("python")


def _link_backend(environment: Path, backends: Path) -> None:
    """Make the folder that the server looks for its Python backend in: the library, and the program for this Python."""
    server, folder = _installed(environment), backends / "python"
    folder.mkdir()
    stub = server / "python_backend_stubs" / _python_of(environment) / "triton_python_backend_stub"
    if not stub.is_file():
        raise UserError(
            f"the wheel nvidia-pytriton has no backend for Python {_python_of(environment)}: expected 3.8 to 3.13"
        )
    for file in (*(server / "backends/python").iterdir(), stub):
        (folder / file.name).symlink_to(file)


def cpu_models(repository: Path) -> list[str]:
    """The models of a repository that a server without a GPU can load; ensembles bring theirs along."""
    found = [path.parent.name for path in sorted(repository.glob("*/config.pbtxt"))]
    return [name for name in found if name.endswith((CPU, CPU + JPEG))]


def _ready(server: Server) -> bool:
    try:
        with urllib.request.urlopen(f"http://{server.http}/v2/health/ready", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _reason(log: str) -> str:
    """What the server gives as the reason that it does not start: the model it cannot load, else its last words."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["it said nothing"]
    said = next((line for line in lines if "failed to load '" in line), lines[-1])
    return said.partition("] ")[2] or said


def _await_ready(server: Server, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not _ready(server):
        if server.process.poll() is not None or time.monotonic() > end:
            raise UserError(f"the Triton server did not start: {_reason(server.log.read_text(errors='replace'))}")
        time.sleep(0.05)


def _command(
    environment: Path, repository: Path, backends: Path, ports: Sequence[int], models: Sequence[str]
) -> list[str]:
    names = ("http", "grpc", "metrics")
    return [
        str(_installed(environment) / "bin/tritonserver"),
        f"--model-repository={repository.absolute()}",
        f"--backend-directory={backends}",
        *(f"--{name}-address=127.0.0.1" for name in names),
        *(f"--{name}-port={port}" for name, port in zip(names, ports, strict=True)),
        "--allow-gpu-metrics=false",
        "--disable-auto-complete-config",
        "--exit-timeout-secs=5",
        "--model-control-mode=explicit",
        *(f"--load-model={name}" for name in models),
    ]


@contextmanager
def running(environment: Path, repository: Path, models: Sequence[str] | None = None) -> Iterator[Server]:
    """Start the server of the virtual `environment` on the folder `repository`; it is stopped at the end.

    `models`: what it loads at the start (default: all that need no GPU). Raises UserError if the server is not installed
    there, or does not become ready.
    """
    environment = environment.absolute()
    chosen = cpu_models(repository) if models is None else models
    with tempfile.TemporaryDirectory(prefix="triton-") as scratch:
        backends, log = Path(scratch) / "backends", Path(scratch) / "log"
        backends.mkdir()
        _link_backend(environment, backends)
        ports = _free_ports(3)
        paths = f"{environment / 'bin'}:{os.environ.get('PATH', '')}"
        variables = os.environ | {"PATH": paths, "VIRTUAL_ENV": str(environment)}
        with log.open("wb") as out:
            process = subprocess.Popen(
                _command(environment, repository, backends, ports, chosen), env=variables, stdout=out, stderr=out
            )
        http, grpc, metrics = (f"127.0.0.1:{port}" for port in ports)
        server = Server(process, http, grpc, metrics, log)
        try:
            _await_ready(server, READY_SECONDS)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def serve(environment: Path, repository: Path) -> None:
    """Run a server until it is interrupted; tells where it answers."""
    if not cpu_models(repository):
        raise UserError(f"'{repository}' holds no model for a server without a GPU: write one with make serve-repo")
    require_unchanged(repository)
    with running(environment, repository) as server:
        print(f"HTTP {server.http}  gRPC {server.grpc}  metrics {server.metrics}", flush=True)
        print(f"models: {', '.join(cpu_models(repository))}; Ctrl-C stops the server", flush=True)
        server.process.wait()
        shutil.copyfileobj(server.log.open(), sys.stderr)
        raise UserError("the server ended by itself: what it said is above")
