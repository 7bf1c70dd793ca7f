"""Who may import whom. Read from the source, so that a lazy import inside a function counts too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("calib", "compensation", "deploy", "benchmarks")
ALLOWED = {
    "calib": {"calib"},
    "compensation": {"calib", "compensation"},
    "deploy": set(ROOMS),
    "benchmarks": {"benchmarks"},
}
HEAVY = ("tensorrt", "tensorrt_rtx", "pycuda", "onnxruntime", "matplotlib")
WITHOUT_TORCH = (
    "deploy.cli", "deploy.doctor", "deploy.verify", "deploy.audit", "deploy.package", "deploy.backends", "deploy.serialize",
    "deploy.runners", "deploy.graph.check", "deploy.report", "calib.preprocess", "benchmarks.accuracy",
)  # fmt: skip


def sources(room):
    return sorted((ROOT / room).rglob("*.py"))


def imports(path, top_level_only=False):
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_it_may(room):
    for path in sources(room):
        for name in imports(path):
            top = name.split(".")[0]
            if top in ROOMS:
                assert top in ALLOWED[room], f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("room", ROOMS)
def test_heavy_packages_are_imported_where_they_are_used(room):
    for path in sources(room):
        for name in imports(path, top_level_only=True):
            assert name.split(".")[0] not in HEAVY, f"{path.relative_to(ROOT)} imports {name} at the top"


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_the_engine_half_runs_without_torch(module):
    script = f"import sys; sys.modules.update(torch=None, timm=None, torchvision=None); import {module}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
