"""report.json: the figures that the stages of a run found out."""

import resource
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.precision import INT8_ENGINE
from calib.task import CLASSIFIER
from deploy import host
from deploy.engine.backends import ONNXRUNTIME
from deploy.measure.onnx_runner import THREADS
from deploy.package import ENGINE, MODEL, MODEL_FP32, stored_bytes

if TYPE_CHECKING:
    from calib.images.image_set import ImageSet
    from calib.quant_model import QuantModel
    from deploy.engine.audit import Audit
    from deploy.engine.backends import Built
    from deploy.execution import Execution
    from deploy.run import Run
    from deploy.verify import CpuSpeed

SAMPLE_WARNING = "sample calibration: not for production (pass CALIB=<folder of your images>)"
FP32_WARNING = (
    "FP32 types beside INT8 (FLOAT=fp32): what is not INT8 has twice the bytes of FP16, and TensorRT-RTX fused no "
    "attention"
)
RANDOM_WARNING = "RANDOM WEIGHTS: for latency work only, never to be served"
PARTS = 4  # of the calibration images, with a role each (calib/images/batches.py)
CHANCE = 3  # times one in so many classes: as good as guessing
RESULTS = "benchmarks/results"  # what benchmarks write, in the checkout
OUT_OF_RANGE = 0.01  # of the values of pictures: more is no overshoot of edges
FEW_IMAGES = 300  # below this, scales usually still move


def warnings(run: "Run") -> list[str]:
    """What must be said wherever this package is shown."""
    found = [*([RANDOM_WARNING] if run.loaded.random else []), *run.loaded.warnings]
    if (bits := run.recipe.precision.weights) < INT8_ENGINE.weights:
        found.append(f"weights are rounded to {bits} bits and stored as INT8: no faster and no smaller than 8 bits")
    if run.calibration.sample:
        found.append(SAMPLE_WARNING)
    elif run.calibration.count < FEW_IMAGES:
        found.append(f"only {run.calibration.count} calibration {run.calibration.kind}: expected {FEW_IMAGES} or more")
    if (sources := len(set(run.calibration.sources))) < PARTS:
        found.append(
            f"the calibration images show {sources} source images only: expected {PARTS} or more, so that images that judge "
            f"are never images that fitted or chose"
        )
    for role, images in (("calibration", run.calibration), ("evaluation", run.evaluation)):
        found += [f"{role}: {each}" for each in images.left_out()]
    if run.evaluation.overlap:
        found.append(
            f"{run.evaluation.overlap} evaluation images left out: they, or their group, are calibration images"
        )
    if run.evaluation.labels is not None and run.task.name != CLASSIFIER:
        found.append(
            f"labels are not used: the network does not say that its outputs are classes (set net.num_classes = "
            f"{run.outputs[0].shape[-1]} in the factory if they are)"
            if run.spec.factory
            else f"labels are not used: the outputs of this network are {run.task.name}, not classes"
        )
    top1 = run.verdict.fidelity.reference_top1
    if top1 is not None and top1 <= CHANCE / run.outputs[0].shape[0]:
        found.append(
            f"the float network itself reaches {top1:.1%} on these labels, no more than chance: class folders are numbered "
            f"by ImageNet's wnids, by their own numbers, or in alphabetic order, which may not be the network's order"
        )
    if (share := run.verdict.fidelity.out_of_range or 0) > OUT_OF_RANGE:
        found.append(
            f"{share:.0%} of the float network's values lie beyond 0..1, which PSNR and SSIM clip: both say little; "
            f"expected a network that returns pictures in 0..1"
        )
    speed, served = run.speed.comparison, run.backend.NAME == ONNXRUNTIME
    if run.speed.integer_layers < len(run.planned):
        so = "the others cost time" if served else "its speed says nothing about TensorRT's"
        found.append(
            f"ONNX Runtime computes {run.speed.integer_layers} of the {len(run.planned)} INT8 layers in integers on "
            f"this CPU (of convolutions those that a quantizer follows, and 1 x 1): {so}"
        )
    if served and speed.high < 1:
        found.append(f"this engine is slower than the float network on this CPU ({speed.ratio:.2f}x)")
    if not host.int8_instructions():
        found.append(
            "this processor has no instructions for INT8 products (VNNI): what ONNX Runtime gains by INT8 here says "
            "nothing about other machines"
        )
    found += run.fp16_range.warnings() if run.options.half else [FP32_WARNING]
    return [*found, *run.speed.warnings(), *run.coverage.warnings(), *run.built.notes]


def peak_rss_mb() -> float:
    """Largest resident set so far of this process or of one that it started, as for the build, in 10^6 bytes."""
    kilobytes = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return round(kilobytes * 1024 / 1e6, 1)


def tool_commit() -> str | None:
    """Commit of the tool's checkout, with `-dirty` if its files differ from it; None outside a checkout.

    Results and pages are no part of the tool: a benchmark that has written them does not make the next commit differ.
    """
    git = ["git", "-C", str(Path(__file__).parents[2])]
    try:
        commit, changed = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True, timeout=20).stdout.strip()
            for command in (
                ["rev-parse", "--short=12", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no", "--", ".", f":!{RESULTS}", ":!*.md"],
            )
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if changed else commit


def images_json(images: "ImageSet") -> dict[str, Any]:
    """Return where a set of images comes from, as plain values."""
    return {
        "source": images.source,
        "kind": images.kind,
        "count": images.count,
        "sources": len(set(images.sources)),
        "sha256": images.sha256,
        "sample": images.sample,
        "skipped": list(images.skipped),
        "other_pictures": list(images.other_pictures),
        "duplicates": images.duplicates,
    }


def waterfall(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the stages that the judge measured, in order, from the rounded network on. Empty if it measured none.

    A stage is measured on images that it was not fitted on, with networks fitted on half of the images, so its figure before
    is not exactly the figure after of the stage before it: compare gains.
    """
    measured = [record for record in history if record["sqnr_after_db"] is not None]
    if not measured:
        return []
    steps = [
        {
            "step": "bias correction" if record["stage"] == "rtn" else record["stage"],
            "sqnr_before_db": record["sqnr_before_db"],
            "sqnr_after_db": record["sqnr_after_db"],
            "gain_db": record["sqnr_after_db"] - record["sqnr_before_db"],
        }
        for record in measured
    ]
    rounded = {"step": "rounded", "sqnr_before_db": None, "sqnr_after_db": steps[0]["sqnr_before_db"], "gain_db": None}
    return [rounded, *steps]


def branch_figures(model: "QuantModel") -> dict[str, dict[str, Any]]:
    """Return by block what is known of its branch: form, R2 (fitted, held out), error before and after, bytes."""
    return {block: model.branch_figures[block] for block in model.branches}


def _speed_json(speed: "CpuSpeed") -> dict[str, Any]:
    return {
        "ort_cpu_ratio": speed.comparison.ratio,
        "ort_cpu": speed.comparison.to_json(),
        "ort_int8_layers": speed.integer_layers,
        "rewrites": speed.written,
        "sqnr_db": speed.sqnr_db,
        "plain_sqnr_db": speed.plain_sqnr_db,
        "batch": speed.batch,
        "threads": THREADS,
    }


def engine_figures(
    built: "Built", audit: "Audit", traffic: dict[str, Any], execution: "Execution", plain: "Built | None" = None
) -> dict[str, Any]:
    """What a report tells of its engine; `plain`: the engine without branches, if one was built."""
    return {
        "backend": built.backend,
        "version": built.version,
        "targets": list(built.targets),
        "bytes": len(built.plan),
        **audit.to_json(),
        "traffic": traffic,
        **execution.to_json(),
        "kernels_without_branches": None if plain is None else len(plain.kernels),
        "bytes_without_branches": None if plain is None else len(plain.plan),
    }


def report_json(run: "Run") -> dict[str, Any]:
    """The figures, as plain values."""
    verdict = run.verdict
    history = [record.to_json() for record in run.model.history]
    return {
        "model": run.model.name,
        "recipe": run.recipe.name,
        "floats": run.options.floats,
        "weights_source": run.loaded.source,
        "warnings": warnings(run),
        "calibration": images_json(run.calibration),
        "evaluation": images_json(run.evaluation),
        "coverage": run.coverage.to_json(),
        "fp16_range": run.fp16_range.to_json(),
        "fidelity": verdict.fidelity.to_json(),
        "parity": {
            "torch_vs_ort_rel_l2": run.parity.rel_l2,
            **{key: value for key, value in run.parity.to_json().items() if key != "rel_l2"},
            "golden_fp32_sqnr_db": verdict.fp32_sqnr_db,
            "golden_fp16_sqnr_db": verdict.fp16_sqnr_db,
        },
        "speed": _speed_json(run.speed),
        "bytes": {
            "float_onnx": stored_bytes(run.float_model),
            **{name: (run.folder / name).stat().st_size for name in (MODEL, MODEL_FP32, ENGINE)},
        },
        "engine": engine_figures(
            run.built,
            run.audit,
            run.kernels.traffic(run.options.profile.opt),
            run.execution,
            run.engine_without_branches,
        ),
        "acceptance": run.acceptance.to_json(),
        "branches": branch_figures(run.model),
        "history": history,
        "waterfall": waterfall(history),
        "float_layers": run.model.float_layers,
        "kept_float": run.model.kept_float,
        **{name: list(getattr(run.model, name)) for name in ("int8_attention", "int8_products", "int8_shortcuts")},
        "seconds": {**run.progress.seconds, "total": round(sum(run.progress.seconds.values()), 3)},
        "peak_rss_mb": peak_rss_mb(),
        "device": str(run.device),
        "machine": {key: value for key, value in host.describe().items() if key != "packages"},
        "commit": tool_commit(),
        "command": run.options.command(),
    }
