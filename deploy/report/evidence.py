"""What the stages found out, and report.json: the figures."""

import resource
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy import host
from deploy.measure.onnx_runner import THREADS
from deploy.package import ENGINE, MODEL, MODEL_FP32

if TYPE_CHECKING:
    from calib.images.image_set import ImageSet
    from calib.network.fp16_range import Fp16Range
    from calib.quant_model import QuantModel
    from calib.scales.coverage import Coverage
    from calib.weights.load import LoadedNet
    from deploy.bridge.parity import Parity
    from deploy.engine.audit import Audit
    from deploy.engine.backends import Built
    from deploy.options import Options
    from deploy.recipe import Recipe
    from deploy.verify import CpuSpeed, Verdict

SAMPLE_WARNING = "sample calibration: not for production (pass CALIB=<folder of your images>)"
RANDOM_WARNING = "RANDOM WEIGHTS: for latency work only, never to be served"
FEW_IMAGES = 300  # below this, scales usually still move


@dataclass(frozen=True)
class Evidence:
    """Everything the stages found out."""

    options: "Options"
    recipe: "Recipe"
    loaded: "LoadedNet"
    calibration: "ImageSet"
    evaluation: "ImageSet"
    model: "QuantModel"
    cache_key: str | None  # equalise and calibrate were taken from the cache under this key
    fp16_range: "Fp16Range"
    coverage: "Coverage"
    parity: "Parity"
    planned: tuple[str, ...]
    built: "Built"
    plain: "Built | None"  # the engine without branches, if there are any
    audit: "Audit"
    verdict: "Verdict"
    speed: "CpuSpeed"
    float_bytes: int
    seconds: dict[str, float]

    def warnings(self) -> list[str]:
        """What must be said wherever this package is shown."""
        found = [RANDOM_WARNING] if self.loaded.random else []
        if self.calibration.sample:
            found.append(SAMPLE_WARNING)
        elif self.calibration.count < FEW_IMAGES:
            found.append(f"only {self.calibration.count} calibration images: expected {FEW_IMAGES} or more")
        if self.calibration.skipped:
            shown = ", ".join(self.calibration.skipped[:3])
            found.append(f"{len(self.calibration.skipped)} unreadable images skipped: {shown}")
        if self.evaluation.overlap:
            found.append(f"{self.evaluation.overlap} evaluation images left out: they are calibration images")
        if self.speed.integer_layers < len(self.planned):
            found.append(
                f"ONNX Runtime computes {self.speed.integer_layers} of the {len(self.planned)} INT8 layers in integers on "
                f"this CPU (its INT8 convolutions want unsigned activations): its speed says nothing about TensorRT's"
            )
        if not host.int8_instructions():
            found.append(
                "this processor has no instructions for INT8 products (VNNI): what ONNX Runtime gains by INT8 here says "
                "nothing about other machines"
            )
        return [*found, *self.fp16_range.warnings(), *self.coverage.warnings(), *self.built.notes]


def peak_rss_mb() -> float:
    """Largest resident set of this process so far, in 10^6 bytes."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1)


def tool_commit() -> str | None:
    """Commit of the tool's checkout, with `-dirty` if files differ; None outside a checkout."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def images_json(images: "ImageSet") -> dict[str, Any]:
    """Where a set of images comes from, as plain values."""
    return {
        "source": images.source,
        "count": images.count,
        "sha256": images.sha256,
        "sample": images.sample,
        "skipped": list(images.skipped),
    }


def waterfall(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """From the float network down to its rounding, and up again: the steps that measured the output, in order.

    Every stage judges itself on images it was not fitted on, which are not the same for all, so a step starts where its own
    judge saw the network and not where the one before ended: gains can be compared, ends cannot. Empty if none measured.
    """
    measured = [record for record in history if record["sqnr_after_db"] is not None]
    if not measured:
        return []
    steps = [
        {
            "step": record["stage"],
            "sqnr_before_db": record["sqnr_before_db"],
            "sqnr_after_db": record["sqnr_after_db"],
            "gain_db": record["sqnr_after_db"] - record["sqnr_before_db"],
        }
        for record in measured
    ]
    rounded = {"step": "rounded", "sqnr_before_db": None, "sqnr_after_db": steps[0]["sqnr_before_db"], "gain_db": None}
    return [rounded, *steps]


def report_json(evidence: Evidence, folder: Path) -> dict[str, Any]:
    """The figures."""
    built, verdict = evidence.built, evidence.verdict
    history = [record.to_json() for record in evidence.model.history]
    return {
        "model": evidence.model.name,
        "recipe": evidence.recipe.name,
        "weights_source": evidence.loaded.source,
        "warnings": evidence.warnings(),
        "calibration": images_json(evidence.calibration),
        "evaluation": images_json(evidence.evaluation),
        "coverage": evidence.coverage.to_json(),
        "fp16_range": evidence.fp16_range.to_json(),
        "fidelity": verdict.fidelity.to_json(),
        "parity": {
            "torch_vs_ort_rel_l2": evidence.parity.rel_l2,
            **{key: value for key, value in evidence.parity.to_json().items() if key != "rel_l2"},
            "golden_fp32_sqnr_db": verdict.fp32_sqnr_db,
            "golden_fp16_sqnr_db": verdict.fp16_sqnr_db,
        },
        "speed": {
            "ort_cpu_ratio": evidence.speed.comparison.ratio,
            "ort_cpu": evidence.speed.comparison.to_json(),
            "ort_int8_layers": evidence.speed.integer_layers,
            "threads": THREADS,
        },
        "bytes": {
            "float_onnx": evidence.float_bytes,
            **{name: (folder / name).stat().st_size for name in (MODEL, MODEL_FP32, ENGINE)},
        },
        "engine": {
            "backend": built.backend,
            "version": built.version,
            "targets": list(built.targets),
            "bytes": len(built.plan),
            **evidence.audit.to_json(),
            "kernels_without_branches": None if evidence.plain is None else len(evidence.plain.kernels),
            "bytes_without_branches": None if evidence.plain is None else len(evidence.plain.plan),
        },
        "branches": evidence.model.branch_figures,
        "history": history,
        "waterfall": waterfall(history),
        "float_layers": evidence.model.float_layers,
        "int8_attention": list(evidence.model.int8_attention),
        "seconds": {**evidence.seconds, "total": round(sum(evidence.seconds.values()), 3)},
        "peak_rss_mb": peak_rss_mb(),
        "machine": {key: value for key, value in host.describe().items() if key != "packages"},
        "commit": tool_commit(),
    }
