"""Small packages whose reports are those of the benchmarks; everything else is made up."""

import copy
import json
from pathlib import Path

import numpy as np

from calib.store.digests import file_sha256
from deploy.package import FILES, GOLDEN, KERNELS, MANIFEST, REPORT, write_json
from tests.docs.pages import ROOT

RESULTS = sorted((ROOT / "benchmarks/results").glob("*.int8*.json"))
QWT, CNN = (ROOT / f"benchmarks/results/{name}.json" for name in ("dinov2_s.int8_qwt", "mobilenetv2.int8"))
SIZE = 12


def _tensor(name, dtype, dims, grows=True):
    return {"name": name, "dtype": dtype, "dims": dims, "grows": grows}


def _kernel(name, kind, dtype, columns):
    reads = [_tensor("x", dtype, [4, 10]), _tensor("w", dtype, [10, columns], grows=False)]
    return {
        "name": name, "kind": kind, "inputs": [dtype, dtype], "outputs": ["fp16"], "layers": [f"{name}/MatMul"],
        "reads": reads, "writes": [_tensor("y", "fp16", [4, columns])], "macs": 40 * columns,
    }  # fmt: skip


KERNEL_LISTS = {
    "int8": [_kernel("a", "gemm", "int8", 30), _kernel("b", "gemm", "int8", 50), _kernel("c", "conv", "fp16", 70)],
    "fp16": [_kernel("a", "gemm", "fp16", 30), _kernel("c", "conv", "fp16", 70)],
    "why_no_twin": "",
}


def manifest_of(report, task="features", batch=8):
    """A manifest that has all that a page reads, without its files."""
    shapes = {which: [size, 3, SIZE, SIZE] for which, size in (("min", 1), ("opt", batch), ("max", 32))}
    return {
        "created": "2026-01-02T03:04:05+00:00",
        "weights": {"source": "made up", "sha256": "a" * 64, "random": False, "module": None},
        "calibration": report["calibration"],
        "preprocessing": {"height": SIZE, "width": SIZE, "mean": [0.5, 0.25, 0.5], "std": [0.25, 0.5, 0.5]},
        "recipe": {"name": report["recipe"], "method": "rtn", "attention": None},
        "engine": {"settings": {"profile": [1, batch, 32]}},
        "task": task,
        "io": {
            "inputs": [{"name": "input", "dtype": "float16", **shapes}],
            "outputs": [{"name": "output", "dtype": "float16", "min": [1, 6], "opt": [8, 6], "max": [32, 6]}],
        },
        "host": {**report["machine"], "packages": {"numpy": np.__version__, "tensorrt": None}},
    }


def golden(count=3):
    """Images and outputs of a made-up network with 6 outputs."""
    generator = np.random.default_rng(0)
    outputs = generator.normal(size=(count, 6)).astype(np.float32)
    return {
        "images": generator.normal(size=(count, 3, SIZE, SIZE)).astype(np.float32),
        "float_output": outputs,
        "simulated_output": outputs + generator.normal(size=outputs.shape).astype(np.float32) / 50,
    }


def read_report(path: Path = QWT):
    """A report that may be changed."""
    return json.loads(path.read_text())


def write_package(folder, report=None, kernels=None, arrays=None, manifest=None):
    """Write a whole package to `folder` and return it; a manifest without files gets those that fit."""
    report = read_report() if report is None else report
    manifest = copy.deepcopy(manifest_of(report) if manifest is None else manifest)
    folder.mkdir(exist_ok=True)
    for name in FILES:
        (folder / name).write_bytes(b"x")
    (folder / REPORT).write_text(json.dumps(report))
    (folder / KERNELS).write_text(json.dumps(KERNEL_LISTS if kernels is None else kernels))
    np.savez(folder / GOLDEN, **(golden() if arrays is None else arrays))
    files = {
        name: {"sha256": file_sha256(folder / name), "bytes": (folder / name).stat().st_size}
        for name in FILES
        if name != MANIFEST
    }
    write_json(folder / MANIFEST, {**manifest, "files": files})
    return folder
