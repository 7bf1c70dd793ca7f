"""Runs code in a process whose libcuda.so.1 is tests/gpu/fake_cuda.c, against the real cuda-bindings."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def compiled(folder: Path, source: Path, name: str, *defines: str) -> Path:
    """The shared library `name` made of a C file in `folder`; the test is skipped where there is no C compiler."""
    try:
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-Wl,-soname,{name}", *defines, "-o",
             folder / name, source, "-ldl"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("no gcc to compile a library that stands in for one of NVIDIA's")
    except subprocess.CalledProcessError as error:
        raise AssertionError(error.stderr) from error
    return folder / name


def fake_cuda(folder: Path) -> Path:
    """`folder` with a libcuda.so.1 in it."""
    return compiled(folder, Path(__file__).with_name("fake_cuda.c"), "libcuda.so.1").parent


def fake_nvml(folder: Path, *defines: str) -> Path:
    """`folder` with a libnvidia-ml.so.1 in it."""
    return compiled(folder, Path(__file__).with_name("fake_nvml.c"), "libnvidia-ml.so.1", *defines).parent


def printed(script: str, library: Path | None, **environment: str) -> str:
    """What `script` prints in a process that finds its libcuda.so.1 in the folder `library`."""
    found = {} if library is None else {"LD_LIBRARY_PATH": str(library)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env={**os.environ, **found, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
