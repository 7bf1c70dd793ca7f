"""The sets of requirements share one base, resolve, and compile nothing."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GPU_SETS = ("requirements-gpu.txt", "requirements-gpu-cuda12.txt")


def lines(name):
    return [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "requirements.txt": ["onnxruntime"],
        "requirements-gpu.txt": ["onnxruntime-gpu", "tensorrt"],
        "requirements-gpu-cuda12.txt": ["onnxruntime-gpu", "tensorrt-cu12"],
    }.items(),
)
def test_a_host_has_what_every_host_has_and_its_own(name, expected):
    first, *rest = lines(name)
    assert first == "-r requirements-base.txt"
    assert [re.fullmatch(r"([\w-]+)==[\d.]+", line)[1] for line in rest] == expected
    assert not {line.split("==")[0] for line in lines("requirements-base.txt")} & {*expected, "pycuda"}


@pytest.mark.parametrize("name", ["requirements-base.txt", "requirements-dev.txt"])
def test_every_version_is_pinned(name):
    assert [line for line in lines(name) if not re.fullmatch(r"[\w.-]+(\[\w+\])?==[\w.]+", line)] == []


@pytest.fixture(scope="module")
def uv(tmp_path_factory):
    """A resolver that reads metadata alone; from PyPI where there is none. Skips without a network."""
    if found := shutil.which("uv"):
        return [found]
    folder = tmp_path_factory.mktemp("uv")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--retries=1", "--target", str(folder), "uv"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("uv cannot be installed here: no network")
    return [str(folder / "bin/uv")]


@pytest.mark.slow
@pytest.mark.parametrize("name", GPU_SETS)
def test_the_set_resolves_from_metadata(uv, name):
    command = [*uv, "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python-version", "3.11", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = dict(line.split("==") for line in done.stdout.splitlines() if "==" in line)
    assert found.keys() >= {"torch", "tensorrt-rtx", "cuda-bindings", "onnxruntime-gpu"}
    assert not found.keys() & {"pycuda", "onnxruntime"}
