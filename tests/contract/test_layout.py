"""Who may import whom. Read from the source, so that a lazy import inside a function counts too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("calib", "compensation", "deploy", "benchmarks")
ALLOWED = {
    "calib": {"calib"},
    "compensation": {"calib", "compensation"},
    "deploy": {"calib", "compensation", "deploy"},
    "benchmarks": set(PACKAGES),
}
# Inside calib: a file imports from its own folder or from rows above its own.
ORDER = (
    ("errors", "inputs", "precision", "quantizer", "tensor_scale"),
    ("task",),
    ("device", "grids", "input_rows", "outputs", "hooks", "modules", "quiet", "store"),
    ("images", "weights", "statistics"),
    ("structure",),
    ("quant_model",),
    ("network",),
    ("judge",),
    ("layerwise", "learned"),
    ("scales", "methods"),
    ("attention",),
)
FLOOR = {name: floor for floor, row in enumerate(ORDER) for name in row}
HEAVY = ("tensorrt", "tensorrt_rtx", "cuda", "pycuda", "onnxruntime", "matplotlib")
WITHOUT_TORCH = (
    "deploy.cli", "deploy.doctor", "deploy.host", "deploy.gpu", "deploy.verify", "deploy.package", "deploy.engine.audit",
    "deploy.engine.backends", "deploy.engine.build", "deploy.engine.packaged", "deploy.explain.kernel_list",
    "deploy.explain.page", "deploy.measure.accuracy", "deploy.measure.latency", "deploy.measure.onnx_runner",
    "deploy.graph.check", "deploy.graph.split_channel_scales", "deploy.report.evidence", "deploy.report.manifest",
    "deploy.pages.write", "deploy.report.terminal", "calib.images.preprocess", "deploy.serve.activate",
    "deploy.serve.client", "deploy.serve.preflight", "deploy.serve.rebuild", "deploy.serve.repository",
    "deploy.serve.server",
)  # fmt: skip


def sources(package):
    return sorted((ROOT / package).rglob("*.py"))


def imports(path, top_level_only=False):
    """Names of modules; `from a import b` gives `a.b` where that is one."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in inner if file_of(name)]
            yield from modules
            if len(modules) < len(inner):
                yield node.module


def file_of(module):
    path = ROOT / module.replace(".", "/")
    return next((one for one in (path.with_suffix(".py"), path / "__init__.py") if one.exists()), None)


def typing_only(path):
    """Modules imported under `if TYPE_CHECKING:` alone, which no running program imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            yield from (each.module for each in node.body if isinstance(each, ast.ImportFrom))


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_the_packages_it_may(package):
    for path in sources(package):
        for name in imports(path):
            top = name.split(".")[0]
            if top in PACKAGES:
                assert top in ALLOWED[package], f"{path.relative_to(ROOT)} imports {name}"


def test_inside_calib_imports_follow_the_order():
    for path in sources("calib"):
        if path == ROOT / "calib/__init__.py":
            continue
        own = path.relative_to(ROOT / "calib").with_suffix("").parts[0]
        assert own in FLOOR, f"calib/{own} is not in ORDER: give it a row"
        for name in imports(path):
            if name.startswith("calib."):
                other = name.split(".")[1]
                assert other == own or FLOOR[other] < FLOOR[own], (
                    f"{path.relative_to(ROOT)} imports {name}, which is not above it"
                )


def test_no_file_imports_itself_through_others():
    edges = {
        path: {file_of(name) for name in {*imports(path)} - {*typing_only(path)}} - {None, path}
        for package in PACKAGES
        for path in sources(package)
    }
    while leaves := {path for path, others in edges.items() if not others & edges.keys()}:
        edges = {path: others for path, others in edges.items() if path not in leaves}
    assert not edges, f"circle among {sorted(str(path.relative_to(ROOT)) for path in edges)}"


@pytest.mark.parametrize("package", PACKAGES)
def test_heavy_packages_are_imported_where_they_are_used(package):
    for path in sources(package):
        for name in imports(path, top_level_only=True):
            assert name.split(".")[0] not in HEAVY, f"{path.relative_to(ROOT)} imports {name} at the top"


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_the_engine_half_runs_without_torch(module):
    script = f"import sys; sys.modules.update(torch=None, timm=None, torchvision=None); import {module}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_tests_mirror_the_tree():
    for path in sorted((ROOT / "tests/unit").rglob("test_*.py")):
        place = path.relative_to(ROOT / "tests/unit")
        tested = place.with_name(place.name.removeprefix("test_"))
        assert (ROOT / tested).exists() or (ROOT / tested.parent / "__init__.py").exists(), f"{path} mirrors nothing"
