"""Every command of docs/serving.md, and its lines of Python, run in order against a real server."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest

from tests.docs.pages import commands
from tests.serve.environments import ROOT, SERVE, TRITON, environment

pytestmark = pytest.mark.slow
PAGE = (ROOT / "docs/serving.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
LINES = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines()]
SERVER = "make serve"


@pytest.fixture
def checkout(tmp_path, changed, package, sentence, pictures):
    """A folder that looks like a checkout in which `make engine` has written a package, with a picture in it."""
    for name in ("deploy", "calib", "Makefile", "requirements-serve.txt", "requirements-triton.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name, folder in (("dinov2_s", package), ("clip_b32_image", package), ("clip_text.Text", sentence)):
        (tmp_path / "artifacts" / name).mkdir(parents=True)
        changed(folder, model=name, weights__random=False).rename(tmp_path / "artifacts" / name / "int8")
    (tmp_path / "clip.json").write_text('{"logit_scale": 100.0}')
    (tmp_path / "photo.jpg").symlink_to(pictures / "01.jpg")
    for kind in (SERVE, TRITON):
        (tmp_path / f".venv-{kind}").symlink_to(environment(kind))
    return tmp_path


def words(command):
    """The command as it runs here: `python` is that of the serving environment, that of `.venv` the tool's own."""
    found = shlex.split(command)
    if found[0] == "python":
        return [".venv-serve/bin/python", *found[1:]]
    if found[0] == ".venv/bin/python":
        return [sys.executable, *found[1:]]
    # the environments are made already, whatever their age; under `make test` make would first name the folder it enters
    return [*found, "--no-print-directory", "--assume-old=.venv-serve/.ready", "--assume-old=.venv-triton/.ready"]


def run(command, folder, port=""):
    command = command.replace("127.0.0.1:8000", port or "127.0.0.1:8000")
    done = subprocess.run(words(command), cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


@contextlib.contextmanager
def served(folder):
    """`make serve`, until it is interrupted; the address of its HTTP service."""
    process = subprocess.Popen(words(SERVER), cwd=folder, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield process.stdout.readline().split()[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)


def test_the_page_has_no_command_outside_its_blocks_but_names_of_verbs():
    inline = [one for one in commands(PAGE) if one not in LINES]
    assert {tuple(one.split()[:4]) for one in inline} <= {
        ("make", "engine"), ("make", "serve"), ("make", "test"), ("python", "-m", "deploy", "preflight"),
        ("python", "-m", "deploy", "serve-repo"),
    }  # fmt: skip


def test_every_command_runs(checkout):
    before, after = LINES[: LINES.index(SERVER)], LINES[LINES.index(SERVER) + 1 :]
    for command in before:
        run(command, checkout)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    with served(checkout) as port:
        script = code.replace("127.0.0.1:8000", port) + "print(features.shape)"
        done = subprocess.run(
            [".venv-serve/bin/python", "-c", script], cwd=checkout, capture_output=True, text=True, check=False
        )
        assert done.stdout == "(1, 1000)\n", done.stderr
        rebuilt, *said = [run(command, checkout, port) for command in after]
    assert rebuilt.endswith(f"written to {checkout / 'artifacts/dinov2_s/l4'}\n")
    assert said == [
        "dinov2_s_cpu: version 2 serves, before it 1\n", "dinov2_s_cpu: version 1 serves, before it 2\n",
        "written to both: clip_b32_image_cpu, clip_b32_image_cpu_jpeg, clip_text.Text_cpu\n",
    ]  # fmt: skip
