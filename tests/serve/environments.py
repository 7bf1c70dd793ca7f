"""The environments that the tests of serving need beside the one they run in: a Triton server, and its client.

Both are made from their requirements once and kept in the user's cache folder. INT8_TRITON_ENVIRONMENT and
INT8_SERVE_ENVIRONMENT name folders of environments that exist already.
"""

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from calib.store.user_cache import cache_folder

ROOT = Path(__file__).parents[2]
TRITON, SERVE = "triton", "serve"
OPTIONS = {TRITON: ["--no-deps"], SERVE: []}
MINUTES = 10


def _made(kind: str) -> Path:
    """The folder of the environment. Raises CalledProcessError, TimeoutExpired or OSError where it cannot be made."""
    requirements = ROOT / f"requirements-{kind}.txt"
    digest = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()[:16]
    folder = cache_folder("environments") / f"{kind}-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{kind}.lock").open("w") as lock:  # tests run side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / ".ready").exists():
            shutil.rmtree(folder, ignore_errors=True)
            run = functools.partial(subprocess.run, check=True, capture_output=True, text=True, timeout=60 * MINUTES)
            run([sys.executable, "-m", "venv", str(folder)])
            run(
                [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", *OPTIONS[kind], "-r", str(requirements)]
            )
            (folder / ".ready").touch()
    return folder


@functools.cache
def environment(kind: str) -> Path:
    """The folder of the virtual environment `kind`; the test is skipped where it cannot be made."""
    if given := os.environ.get(f"INT8_{kind.upper()}_ENVIRONMENT"):
        return Path(given)
    try:
        return _made(kind)
    except (subprocess.SubprocessError, OSError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        pytest.skip(f"requirements-{kind}.txt cannot be installed: {said[-1] if said else error}")


def use_client() -> None:
    """Make the Triton client importable, behind the packages that are installed here."""
    (packages,) = (environment(SERVE) / "lib").glob("python3.*/site-packages")
    if str(packages) not in sys.path:
        sys.path.append(str(packages))


def with_this_numpy(original: Path, folder: Path) -> Path:
    """Make `folder` an environment like `original` but for numpy, which is the one that is installed here."""
    (packages,) = original.glob("lib/python3.*/site-packages")
    made = folder / packages.relative_to(original)
    made.mkdir(parents=True)
    (folder / "bin").mkdir()
    shutil.copy(original / "pyvenv.cfg", folder)
    links = {folder / "bin" / each.name: each.resolve() for each in (original / "bin").glob("python*")}
    links |= {made / each.name: each for each in packages.iterdir() if not each.name.startswith("numpy")}
    links |= {made / each.name: each for each in Path(np.__file__).parents[1].glob("numpy*")}
    for link, target in links.items():
        link.symlink_to(target)
    return folder
