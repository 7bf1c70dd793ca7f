"""What a built engine computes on this machine, beside what its graph computes in ONNX Runtime. No torch."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from calib.errors import UserError
from calib.task import Task
from deploy.engine.graph_runner import GraphRunner
from deploy.engine.packaged import runner_of_package
from deploy.engine.runner import EngineRunner
from deploy.errors import ContractError
from deploy.graph.names import INPUT
from deploy.measure.accuracy import Fidelity, fidelity, joined_rows, mean_sqnr_db, sqnr_db
from deploy.measure.onnx_runner import Given, OnnxRunner
from deploy.measure.outputs import Outputs
from deploy.package import ENGINE, GOLDEN, MODEL_FP32
from deploy.verify import Reference, Verdict, golden_arrays, golden_db, least_fp16_db, outputs_over


@dataclass(frozen=True)
class Execution:
    """The engine's outputs, judged against the float network; `reason` tells why it was not run, None if it was.

    `device`: the name of the GPU or processor that it ran on. `fidelity`: on the evaluation images. `golden_db`, `graph_db`:
    SQNR (dB) of every golden image, of the engine and of the FP32-typed graph in ONNX Runtime.
    """

    reason: str | None = None
    device: str | None = None
    fidelity: Fidelity | None = None
    golden_db: tuple[float, ...] = ()
    graph_db: tuple[float, ...] = ()

    def failure(self, verdict: Verdict) -> str | None:
        """A sentence on what the engine loses beside its graph, or None.

        It has the limit of the FP16-typed graph, which has the same types: kernels that add in another order, or round to
        FP16 elsewhere, move values across rounding boundaries. An error of a kernel or an overflow costs tens of dB.
        """
        if self.fidelity is None:
            return None
        if reason := self.golden_failure():
            return reason
        engine, graph = self.fidelity.sqnr_db, verdict.fidelity.sqnr_db
        if not engine >= least_fp16_db(graph):
            return (
                f"the engine reaches {engine:.1f} dB on {self.fidelity.count} images where {MODEL_FP32} reaches "
                f"{graph:.1f} dB: expected at least {least_fp16_db(graph):.1f} dB"
            )
        return None

    def golden_failure(self) -> str | None:
        """The part of `failure` that the golden images tell."""
        if self.fidelity is None:
            return None
        engine, graph = float(np.mean(self.golden_db)), float(np.mean(self.graph_db))
        if not engine >= least_fp16_db(graph):
            worst = int(np.argmin(np.subtract(self.golden_db, self.graph_db)))  # of NaN, the first
            return (
                f"the engine reaches {engine:.1f} dB on the golden images where {MODEL_FP32} reaches {graph:.1f} dB: "
                f"expected at least {least_fp16_db(graph):.1f} dB; worst is image {worst} of {GOLDEN}, "
                f"{self.golden_db[worst]:.1f} instead of {self.graph_db[worst]:.1f} dB"
            )
        return None

    def summary(self) -> str:
        """The result in one line."""
        if self.fidelity is None:
            return f"not run: {self.reason}"
        return f"{self.fidelity.sqnr_db:.1f} dB SQNR on {self.fidelity.count} images, on {self.device}"

    def golden_summary(self) -> str:
        """The result on the golden images in one line, as `golden_faults` tells it."""
        if self.fidelity is None:
            return f"not run: {self.reason}"
        engine, graph = float(np.mean(self.golden_db)), float(np.mean(self.graph_db))
        return f"run on {self.device}: {engine:.1f} dB on the golden images where {MODEL_FP32} reaches {graph:.1f} dB"

    def to_json(self) -> dict[str, Any]:
        """Plain values, for report and manifest."""
        if self.fidelity is None:
            return {"executed": False, "not_executed": self.reason}
        return {
            "executed": True,
            "device": self.device,
            "fidelity": self.fidelity.to_json(),
            "golden_sqnr_db": list(self.golden_db),
        }


def _image_db(reference: Outputs, output: Outputs) -> tuple[float, ...]:
    """The SQNR (dB) of every image."""
    return tuple(sqnr_db(*rows) for rows in zip(joined_rows(reference), joined_rows(output, reference), strict=True))


def _call(engine: EngineRunner | GraphRunner, given: Given) -> Outputs:
    arrays = {INPUT: given} if isinstance(given, np.ndarray) else given
    return engine({name: array.astype(engine.tensors.inputs[name].dtype) for name, array in arrays.items()})


def golden_sqnr_db(engine: EngineRunner | GraphRunner, given: Given, reference: Outputs) -> float:
    """SQNR (dB) of an open `engine` on the golden images `given`, mean over images.

    Raises ContractError if its outputs are others than those of `reference`.
    """
    found = outputs_over(lambda batch: _call(engine, batch), [given])
    if {*found} != {*reference}:
        raise ContractError(f"{ENGINE} returns {', '.join(found)}: expected {', '.join(reference)}")
    return mean_sqnr_db(joined_rows(reference), joined_rows({name: found[name] for name in reference}, reference))


def golden_faults(folder: Path) -> tuple[list[str], str]:
    """(sentences on what the engine of the package in `folder` does to its golden images, what was run or why not).

    The limit is that of `Execution.failure`. Raises UserError if the golden file is not one of a package.
    """
    given, reference, _ = golden_arrays(folder / GOLDEN)
    try:
        with runner_of_package(folder) as engine:
            own = golden_sqnr_db(engine, given, reference)
    except UserError as reason:
        return [], f"not run: {reason}"
    except ContractError as fault:
        return [str(fault)], "run"
    graph = golden_db(reference, folder / MODEL_FP32, given)
    said = f"{ENGINE} reaches {own:.1f} dB on the golden images where {MODEL_FP32} reaches {graph:.1f} dB"
    least = least_fp16_db(graph)
    return ([] if own >= least else [f"{said}: expected at least {least:.1f} dB"]), f"run: {said}"


def executed_here(
    backend: ModuleType, plan: bytes, execute: Callable[[EngineRunner | GraphRunner], Execution]
) -> Execution:
    """What `execute` finds out with the engine `plan` open, or why it cannot be opened here."""
    if reason := backend.cannot_run():
        return Execution(reason)
    with ExitStack() as opened:
        try:
            engine = opened.enter_context(backend.runner(plan))
        except UserError as error:
            return Execution(str(error))
        return execute(engine)


def executed_on_golden(backend: ModuleType, plan: bytes, folder: Path, task: Task) -> Execution:
    """Run the engine `plan` on the golden images of the package in `folder`, whose outputs are `task`, if it can run here.

    Raises UserError if the golden file is not one of a package.
    """
    given, exact, _ = golden_arrays(folder / GOLDEN)

    def execute(engine: EngineRunner | GraphRunner) -> Execution:
        found = outputs_over(lambda batch: _call(engine, batch), [given])
        if {*found} != {*exact}:
            raise UserError(
                f"the engine returns {', '.join(found)}, {GOLDEN} holds {', '.join(exact)}: build the package again"
            )
        found = {name: found[name] for name in exact}
        graph = outputs_over(OnnxRunner(folder / MODEL_FP32).named_outputs, [given])
        return Execution(
            device=backend.device_name(),
            fidelity=fidelity(exact, found, task),
            golden_db=_image_db(exact, found),
            graph_db=_image_db(exact, graph),
        )

    return executed_here(backend, plan, execute)


def executed(engine: EngineRunner | GraphRunner, device: str, folder: Path, reference: Reference) -> Execution:
    """Run an open `engine` on the images of `reference`, and compare it with the float network.

    `device`: what it runs on. `folder`: of the package, whose FP32-typed graph runs on the golden images too.
    """

    def computed(some: Iterable[Given], expected: Outputs) -> Outputs:
        found = outputs_over(lambda batch: _call(engine, batch), some)
        return {name: found[name] for name in expected}  # an engine may have its outputs in another order

    exact, golden, graph = reference.golden_outputs, [reference.golden], OnnxRunner(folder / MODEL_FP32).named_outputs
    return Execution(
        device=device,
        fidelity=reference.fidelity(computed(reference.batches, reference.outputs)),
        golden_db=_image_db(exact, computed(golden, exact)),
        graph_db=_image_db(exact, outputs_over(graph, golden)),
    )
