"""Verifies the exported network with ONNX Runtime on images that it was not calibrated on. No torch."""

import functools
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calib.errors import UNREADABLE_ARRAYS, UserError, first_line
from calib.store.digests import file_sha256
from calib.task import Task
from deploy.measure.accuracy import Fidelity, fidelity, joined_rows, mean_sqnr_db
from deploy.measure.latency import Comparison, compare
from deploy.measure.onnx_runner import Given, OnnxRunner, count_samples, first
from deploy.measure.outputs import Outputs
from deploy.package import (
    FILES,
    GOLDEN,
    GOLDEN_FLOAT,
    GOLDEN_INPUT,
    GOLDEN_ONLY,
    GOLDEN_SIMULATED,
    MANIFEST,
    MODEL,
    MODEL_FP32,
    not_accepted,
    read_json,
)

# FP16 moves values across rounding boundaries, as another processor does: that changed the SQNR of the few golden images
# by -2.1 to +2.7 dB. An overflow costs tens of dB.
MAX_FP16_LOSS_DB = 3.0
# The noise of FP16 alone. ONNX Runtime rounds to FP16 after every operation: 35-41 dB on networks with random weights.
FP16_NOISE_DB = 33.0
# Another processor sums in another order, which rounds ties differently, and the golden images are a small sample.
MAX_DRIFT_DB = 3.0
# Below these a result is no network of use: a tenth of the output's power is noise, every second answer another one.
LEAST_DB = 10.0
LEAST_AGREEMENT = 0.5
LONGEST_CALL_S = 5.0  # of the float graph when it is timed: some 30 calls of both are
PLAIN_NAME = r"\w[\w.-]*"  # of a file inside a package: no separators, no ".."


def least_fp16_db(fp32_sqnr_db: float) -> float:
    """The least SQNR (dB) required of the FP16-typed graph, given the SQNR of the same graph with FP32 types."""
    both = -10 * np.log10(10 ** (-fp32_sqnr_db / 10) + 10 ** (-FP16_NOISE_DB / 10))
    return min(fp32_sqnr_db - MAX_FP16_LOSS_DB, both)


@dataclass(frozen=True)
class Verdict:
    """The fidelity on the evaluation images, and the SQNR (dB, mean over images) of both graphs on the golden images.

    `fp32_sqnr_db` is that of the FP32-typed graph, `fp16_sqnr_db` that of the FP16-typed graph, run node by node or with the
    optimizations of ONNX Runtime, whichever is lower.
    """

    fidelity: Fidelity
    fp32_sqnr_db: float
    fp16_sqnr_db: float

    def failure(self) -> str | None:
        """A sentence on the value beyond its limit, or None."""
        if not self.fp16_sqnr_db >= least_fp16_db(self.fp32_sqnr_db):
            return (
                f"{MODEL} (FP16) reaches {self.fp16_sqnr_db:.1f} dB where {MODEL_FP32} reaches {self.fp32_sqnr_db:.1f} dB: "
                f"expected at least {least_fp16_db(self.fp32_sqnr_db):.1f} dB. Values overflow FP16, or the "
                f"network amplifies its rounding"
            )
        return None

    def no_longer_the_network(self) -> str | None:
        """A sentence where the rounded network is no longer the float one, or None.

        It does not hold for random weights, whose output any noise can drown.
        """
        found = self.fidelity
        if not found.sqnr_db >= LEAST_DB:
            what = f"its output has {found.sqnr_db:.1f} dB SQNR to the float network's, expected {LEAST_DB:.0f} or more"
        elif found.top1_agreement is not None and not found.top1_agreement >= LEAST_AGREEMENT:
            what = f"it agrees with the float network on {found.top1_agreement:.0%} of the images"
        else:
            return None
        return (
            f"the rounded network is no longer the float one: {what}; usual causes are calibration images that are not "
            f"preprocessed as the network expects or not of the kind it sees, and a recipe too plain for it (RECIPE=int8)"
        )


def outputs_over(compute: Callable[[Given], Outputs], batches: Iterable[Given]) -> dict[str, np.ndarray]:
    """All outputs (N, ...) that `compute` returns for `batches`, by name, as float32."""
    found = [compute(batch) for batch in batches]
    return {name: np.concatenate([each[name] for each in found]).astype(np.float32) for name in found[0]}


def golden_db(reference: Outputs, model: Path, golden: Given, fused: bool = True) -> float:
    """The SQNR (dB, mean over images) of the graph `model` on the `golden` images."""
    found = outputs_over(OnnxRunner(model, fused=fused).named_outputs, [golden])
    return mean_sqnr_db(joined_rows(reference), joined_rows(found, reference))


@dataclass(frozen=True)
class Reference:
    """The images that judge, and what the float network, the graph `float_model`, computes of them in ONNX Runtime.

    `batches`: re-iterable, images float32 (B, 3, H, W) or named inputs (B, ...). `golden`: a few of them. `task`: what the
    outputs are. `labels`: as `fidelity` takes them. `sources`: the number of each image's source image.
    """

    float_model: Path
    batches: Iterable[Given]
    golden: Given
    task: Task
    labels: Any = None
    sources: Sequence[int] | None = None

    @functools.cached_property
    def _computed(self) -> tuple[Outputs, Outputs]:
        """(outputs of all `batches`, of the `golden` images), in a session that ends here: it takes twice the weights."""
        compute = OnnxRunner(self.float_model).named_outputs
        return outputs_over(compute, self.batches), outputs_over(compute, [self.golden])

    @property
    def outputs(self) -> Outputs:
        """Those of all `batches`."""
        return self._computed[0]

    @property
    def golden_outputs(self) -> Outputs:
        """Those of the `golden` images."""
        return self._computed[1]

    def fidelity(self, outputs: Outputs) -> Fidelity:
        """How near `outputs` of all `batches` come."""
        return fidelity(self.outputs, outputs, self.task, self.labels, self.sources)


def verify_fidelity(folder: Path, reference: Reference) -> Verdict:
    """Measure both graphs of the package in `folder` against the float network."""
    exact, golden = reference.golden_outputs, reference.golden
    return Verdict(  # one session at a time
        fidelity=reference.fidelity(outputs_over(OnnxRunner(folder / MODEL_FP32).named_outputs, reference.batches)),
        fp32_sqnr_db=golden_db(exact, folder / MODEL_FP32, golden, fused=False),
        # Node by node, FP16 overflows as in an engine; with its optimizations ONNX Runtime computes in FP32, but may misread
        fp16_sqnr_db=min(golden_db(exact, folder / MODEL, golden, fused=fused) for fused in (False, True)),
    )


@dataclass(frozen=True)
class CpuSpeed:
    """Speed of the INT8 graph against the float graph in ONNX Runtime, and the number of layers it computes in integers.

    `batch`: images at a time. `written`: operator -> number of nodes that deploy/graph/integer_kernels wrote into the graph
    that was timed. `sqnr_db`: SQNR of that graph to the float graph on the timed images (mean over images),
    `plain_sqnr_db`: of the graph that ships.
    """

    comparison: Comparison
    batch: int
    integer_layers: int
    written: dict[str, int]
    sqnr_db: float
    plain_sqnr_db: float

    def warnings(self) -> list[str]:
        """A sentence if the graph that was timed computes something else than the one that ships."""
        if self.sqnr_db >= self.plain_sqnr_db - MAX_DRIFT_DB:
            return []
        return [
            f"with integer kernels ONNX Runtime reaches {self.sqnr_db:.1f} dB, without them {self.plain_sqnr_db:.1f} dB: "
            f"the speed is not that of {MODEL_FP32}"
        ]


def timed_samples(count: int, seconds: float) -> int:
    """Return how many of `count` samples to time, which together took `seconds`: one or more, within LONGEST_CALL_S."""
    return max(1, min(count, int(count * LONGEST_CALL_S / seconds)))


def cpu_speed(folder: Path, float_model: Path, given: Given) -> CpuSpeed:
    """Time the float graph and the INT8 graph with integer kernels in turn on the batch `given`, in ONNX Runtime.

    A batch that takes the float graph longer than LONGEST_CALL_S is timed in part.
    """
    from deploy.measure.integer_graph import integer_graph, integer_layers  # needs onnx, which a server has not

    baseline = OnnxRunner(float_model)
    start = time.perf_counter()
    reference = outputs_over(baseline.named_outputs, [given])
    few = timed_samples(count_samples(given), time.perf_counter() - start)
    batch = first(given, few)
    plain_sqnr_db = golden_db(reference, folder / MODEL_FP32, given)  # sessions that need not run in turn end first
    graph, written = integer_graph(folder / MODEL_FP32)
    layers, candidate = integer_layers(graph), OnnxRunner(graph)
    return CpuSpeed(
        compare(lambda: baseline(batch), lambda: candidate(batch)),
        few,
        layers,
        written,
        sqnr_db=mean_sqnr_db(
            joined_rows(reference), joined_rows(outputs_over(candidate.named_outputs, [given]), reference)
        ),
        plain_sqnr_db=plain_sqnr_db,
    )


def require_package(folder: Path) -> None:
    """Raise UserError if `folder` holds no manifest."""
    if not (folder / MANIFEST).is_file():
        beside = not_accepted(folder)
        why = f"; one that did not keep its limits is in '{beside}'" if (beside / MANIFEST).is_file() else ""
        raise UserError(
            f"no package at '{folder}': expected a folder with {MANIFEST}; build one with make engine, or give the MODEL=, "
            f"MODULE=, WEIGHTS=, RECIPE= and OUT= that it was built with{why}"
        )


def recorded_sha256(manifest: Path) -> dict[str, str]:
    """File name -> recorded sha256 (hex) of all files that a manifest lists; the manifest may be of any origin.

    Raises UserError if it has no such list or if a name leads out of the folder.
    """
    files = read_json(manifest).get("files")
    if not isinstance(files, dict):
        raise UserError(f"'{manifest}' has no table 'files': expected the manifest of a package; build it again")
    found = {}
    for name, recorded in files.items():
        if not re.fullmatch(PLAIN_NAME, name):
            raise UserError(f"'{manifest}' lists the file {name!r}: expected names without folders; build it again")
        sha256 = recorded.get("sha256") if isinstance(recorded, dict) else None
        if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
            raise UserError(f"'{manifest}' records no sha256 of '{name}': expected 64 hex digits; build it again")
        found[name] = sha256
    return found


def _under(prefix: str, arrays: Outputs) -> dict[str, np.ndarray]:
    """The arrays whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _sound(given: Given, reference: Outputs, simulated: Outputs) -> bool:
    """Whether these are inputs with the outputs of float network and simulation, floating point."""
    inputs = [given] if isinstance(given, np.ndarray) else [*given.values()]
    outputs = [*reference.values(), *simulated.values()]
    return (
        all(array.ndim and array.dtype.kind in "fib" for array in inputs)
        and (isinstance(given, Mapping) or (given.ndim == 4 and given.dtype.kind == "f"))
        and reference.keys() == simulated.keys() != set()
        and all(array.dtype.kind == "f" and array.size and array.ndim >= 2 for array in outputs)
        and all(array.shape == simulated[name].shape for name, array in reference.items())
        and len({len(array) for array in (*inputs, *outputs)}) == 1
    )


def golden_arrays(path: Path) -> tuple[Given, Outputs, Outputs]:
    """(images (N, 3, H, W) or named inputs (N, ...), outputs (N, ...) of the float network and of the simulation by name).

    Raises UserError if the file is not an archive of such arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as golden:
            arrays = {name: golden[name] for name in golden.files}
        given = _under(GOLDEN_INPUT, arrays) or arrays[GOLDEN_ONLY]
        reference, simulated = (_under(prefix, arrays) for prefix in (GOLDEN_FLOAT, GOLDEN_SIMULATED))
    except (*UNREADABLE_ARRAYS, KeyError, AttributeError) as error:
        raise UserError(f"'{path}' holds no golden images and outputs ({error}): build the package again") from error
    if not _sound(given, reference, simulated):
        found = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items())
        raise UserError(
            f"'{path}' holds {found}: expected float images (N, 3, H, W) or {GOLDEN_INPUT}... (N, ...), and "
            f"{GOLDEN_FLOAT}... and {GOLDEN_SIMULATED}... (N, ...) of the same names; build the package again"
        )
    return given, reference, simulated


def file_faults(folder: Path) -> list[str]:
    """One sentence for each file of a package that is missing, changed or not recorded in its manifest.

    Raises UserError if there is no manifest, or one that lists no files.
    """
    require_package(folder)
    recorded = recorded_sha256(folder / MANIFEST)
    present = [path.name for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    unknown = [name for name in dict.fromkeys((*FILES, *present)) if name != MANIFEST and name not in recorded]
    wrong = [f"{name} is not recorded in {MANIFEST}: not shown to be part of the package" for name in unknown]
    for name, sha256 in recorded.items():
        if not (folder / name).is_file():
            wrong.append(f"{name} is missing")
        elif file_sha256(folder / name) != sha256:
            wrong.append(f"{name} has changed since it was built (sha256 differs)")
    return wrong


def broken_limits(folder: Path) -> list[str]:
    """The limits that the package in `folder` did not keep when it was built (deploy/acceptance.py), in words."""
    acceptance = read_json(folder / MANIFEST).get("acceptance")
    checks = acceptance.get("checks") if isinstance(acceptance, dict) else None
    return [
        f"{each.get('limit')}: {each.get('measured')}"
        for each in (checks if isinstance(checks, list) else ())
        if isinstance(each, dict) and each.get("kept") is not True
    ]


def verify_package(folder: Path) -> list[str]:
    """One sentence for each fault of a finished package: missing, changed or unrecorded files, outputs that lost fidelity.

    Needs only the folder: no torch, no images. The digests detect accidents, not an attacker, who can write a manifest
    that fits: nothing is signed. Raises UserError if the manifest or the golden file is not one of a package.
    """
    if wrong := file_faults(folder):
        return wrong
    given, reference, simulated = golden_arrays(folder / GOLDEN)
    recorded_db = mean_sqnr_db(joined_rows(reference), joined_rows(simulated, reference))
    try:
        found = golden_db(reference, folder / MODEL_FP32, given)
    except Exception as error:  # ONNX Runtime's own, of many types: the files may be of any origin
        reason = first_line(error, 200)
        raise UserError(
            f"{MODEL_FP32} in '{folder}' cannot be run on the golden images ({reason}): build the package again"
        ) from error
    if not found >= recorded_db - MAX_DRIFT_DB:
        wrong.append(
            f"{MODEL_FP32} reaches {found:.1f} dB on the golden images, {recorded_db:.1f} dB when it was built"
        )
    return wrong
