"""What was built, from what, and how good it is: report.json (figures), manifest.json (provenance), and the table."""

import os
import resource
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.table import Table

from deploy import host
from deploy.package import ENGINE, FILES, MANIFEST, MODEL, MODEL_FP32, file_sha256
from deploy.runners import THREADS

if TYPE_CHECKING:
    from calib.adequacy import Adequacy
    from calib.fp16_range import Fp16Range
    from calib.images import ImageSet
    from calib.quant_model import QuantModel
    from calib.weights import LoadedNet
    from deploy.audit import Audit
    from deploy.backends import Built
    from deploy.parity import Parity
    from deploy.pipeline import Options
    from deploy.recipe import Recipe
    from deploy.verify import CpuSpeed, Verdict

SAMPLE_WARNING = "sample calibration: not for production (pass CALIB=<folder of your images>)"
RANDOM_WARNING = "RANDOM WEIGHTS: for latency work only, never to be served"
TABLE_WIDTH = 118  # characters, where there is no terminal to ask
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
    adequacy: "Adequacy"
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
        return [*found, *self.fp16_range.warnings(), *self.adequacy.warnings(), *self.built.notes]


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


def _images_json(images: "ImageSet") -> dict[str, Any]:
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


def branch_figures(model: "QuantModel") -> dict[str, dict[str, Any]]:
    """Block -> what is known of its branch: form, R2 (of the paper, across photographs), error before and after, bytes."""
    found: dict[str, dict[str, Any]] = {}
    for record in model.history:
        found |= record.details.get("kept", {})
    return {block: found[block] for block in model.branches}


def report_json(evidence: Evidence, folder: Path) -> dict[str, Any]:
    """The figures."""
    built, verdict = evidence.built, evidence.verdict
    history = [record.to_json() for record in evidence.model.history]
    return {
        "model": evidence.model.name,
        "recipe": evidence.recipe.name,
        "weights_source": evidence.loaded.source,
        "warnings": evidence.warnings(),
        "calibration": _images_json(evidence.calibration),
        "evaluation": _images_json(evidence.evaluation),
        "adequacy": evidence.adequacy.to_json(),
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
        "branches": branch_figures(evidence.model),
        "history": history,
        "waterfall": waterfall(history),
        "float_layers": evidence.model.float_layers,
        "int8_attention": list(evidence.model.int8_attention),
        "seconds": {**evidence.seconds, "total": round(sum(evidence.seconds.values()), 3)},
        "peak_rss_mb": peak_rss_mb(),
        "machine": {key: value for key, value in host.describe().items() if key != "packages"},
        "commit": tool_commit(),
    }


def manifest_json(evidence: Evidence, folder: Path) -> dict[str, Any]:
    """Provenance: what a loader must compare before it trusts the engine."""
    files = [name for name in FILES if name != MANIFEST]
    return {
        "model": evidence.model.name,
        "warnings": evidence.warnings(),
        "servable": not evidence.loaded.random,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": {
            name: {"sha256": file_sha256(folder / name), "bytes": os.path.getsize(folder / name)} for name in files
        },
        "weights": {
            "source": evidence.loaded.source,
            "sha256": evidence.loaded.sha256,
            "random": evidence.loaded.random,
        },
        "calibration": _images_json(evidence.calibration),
        "preprocessing": evidence.calibration.preprocessing.to_json(),
        "recipe": evidence.recipe.to_json(),
        "calibration_cache": evidence.cache_key,
        "planned_int8_layers": list(evidence.planned),
        "engine": {
            "backend": evidence.built.backend,
            "version": evidence.built.version,
            "targets": list(evidence.built.targets),
            "settings": evidence.built.settings,
            "audit": evidence.audit.to_json(),
        },
        "io": {"input": "FP16 (batch, 3, height, width), normalised", "output": "FP16 (batch, outputs)"},
        "host": host.describe(),
        "commit": tool_commit(),
    }


def _shown_steps(steps: Sequence[dict[str, Any]]) -> str:
    """One line of `waterfall`: where rounding leaves the network, then what every step adds."""
    gains = (f"{step['step']} {step['gain_db']:+.1f} dB" for step in steps[1:])
    return " -> ".join(["float", f"{steps[0]['step']} {steps[0]['sqnr_after_db']:.1f} dB", *gains])


def _shown_branches(branches: dict[str, dict[str, Any]], engine: dict[str, Any]) -> str:
    """How many branches of which forms, how well they do at their blocks, and what they cost together."""
    forms = [found["form"] for found in branches.values()]
    counts = ", ".join(f"{form} x{forms.count(form)}" for form in dict.fromkeys(forms))
    scores = [found["r2_cv"] for found in branches.values() if "r2_cv" in found]
    mended = f", R2 {min(scores):.2f} to {max(scores):.2f} on other photographs" if scores else ""
    kernels = engine["kernels"] - engine["kernels_without_branches"]
    size = (engine["bytes"] - engine["bytes_without_branches"]) / 1e6
    return f"{counts}{mended}; {kernels:+d} kernels, {size:+.2f} MB"


def _repairs(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What every stage that measured itself did to the output, and what branches cost."""
    steps, branches = waterfall(report["history"]), report["branches"]
    rows = [("repairs, on other photographs", _shown_steps(steps))] if steps else []
    return [*rows, ("branches", _shown_branches(branches, report["engine"]))] if branches else rows


def _rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    fidelity, engine, parity, size = report["fidelity"], report["engine"], report["parity"], report["bytes"]
    rows = [
        ("weights", report["weights_source"]),
        ("calibrated on", f"{report['calibration']['count']} images: {report['calibration']['source']}"),
        ("judged on", f"{fidelity['count']} images: {report['evaluation']['source']}"),
        ("fidelity to float", f"SQNR {fidelity['sqnr_db']:.1f} dB, cosine {fidelity['cosine']:.4f}"),
        (f"top-1 agreement ({fidelity['top1_kind']})", f"{fidelity['top1_agreement']:.1%}"),
    ]
    if fidelity["kl"] is not None:
        rows.append(("KL of class probabilities", f"{fidelity['kl']:.4f} nats"))
    if fidelity["top1"] is not None:
        rows.append(("top-1 accuracy", f"{fidelity['top1']:.2%} (float {fidelity['reference_top1']:.2%})"))
    return [
        *rows,
        *_repairs(report),
        ("simulation vs ONNX", f"{parity['torch_vs_ort_rel_l2']:.1e} relative L2, same integers in every layer"),
        ("FP16 vs FP32 types", f"{parity['golden_fp16_sqnr_db']:.1f} vs {parity['golden_fp32_sqnr_db']:.1f} dB"),
        ("speed, ONNX Runtime CPU", f"{report['speed']['ort_cpu_ratio']:.2f}x float (batch 8, 2 threads)"),
        ("size", f"float {size['float_onnx'] / 1e6:.1f} MB, {MODEL} {size[MODEL] / 1e6:.1f} MB, "
                 f"engine {size[ENGINE] / 1e6:.1f} MB"),
        ("engine", f"{engine['backend']} {engine['version']} for {', '.join(engine['targets'])}"),
        ("INT8 proof", f"{engine['int8_gemms']} INT8 GEMMs, {engine['int8_convs']} INT8 convolutions, "
                       f"{engine['fused_attention']} fused attention kernels ({engine['int8_attention']} INT8); "
                       f"FP16 GEMMs {engine['fp16_gemms']}, FP32 GEMMs {engine['fp32_gemms']}; "
                       f"{engine['kernels']} kernels"),
        ("time, peak memory", f"{report['seconds']['total']:.0f} s, {report['peak_rss_mb']:.0f} MB"),
    ]  # fmt: skip


def print_report(report: dict[str, Any], folder: Path, stream: TextIO | None = None) -> None:
    """The one table, on `stream` (stdout by default), and every warning under it."""
    terminal = stream is None and os.isatty(1)
    console = Console(file=stream, highlight=False, width=None if terminal else TABLE_WIDTH)
    table = Table(title=f"{report['model']}, recipe {report['recipe']}", show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in _rows(report):
        table.add_row(key, value)
    console.print(table)
    for warning in report["warnings"]:
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    console.print(f"written to {folder}", markup=False, soft_wrap=True)
