"""The report as one table on the terminal, every warning under it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deploy.engine.backends import ONNXRUNTIME
from deploy.package import ENGINE, MODEL
from deploy.report.evidence import waterfall
from deploy.report.proof import proven_and_planned

FLOAT_KERNELS = {
    "fp16_gemms": "FP16 GEMMs", "fp16_convs": "FP16 convolutions",
    "fp32_gemms": "FP32 GEMMs", "fp32_convs": "FP32 convolutions",
}  # fmt: skip
TABLE_WIDTH = 118  # characters, where there is no terminal to ask


def _shown_steps(steps: Sequence[dict[str, Any]]) -> str:
    """One line of `waterfall`: where rounding leaves the network, then what every step adds."""
    gains = (f"{step['step']} {step['gain_db']:+.1f} dB" for step in steps[1:])
    return " -> ".join(["float", f"{steps[0]['step']} {steps[0]['sqnr_after_db']:.1f} dB", *gains])


def _shown_branches(branches: dict[str, dict[str, Any]], engine: dict[str, Any]) -> str:
    """How many branches of which forms, how well they do at their blocks, and what they cost together."""
    forms = [found["form"] for found in branches.values()]
    counts = ", ".join(f"{form} x{forms.count(form)}" for form in dict.fromkeys(forms))
    scores = [found["r2_cv"] for found in branches.values() if "r2_cv" in found]
    removed = f", R2 {min(scores):.2f} to {max(scores):.2f} on held-out images" if scores else ""
    kernels = engine["kernels"] - engine["kernels_without_branches"]
    size = (engine["bytes"] - engine["bytes_without_branches"]) / 1e6
    return f"{counts}{removed}; {kernels:+d} kernels, {size:+.2f} MB"


def _repairs(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What every stage that measured itself did to the output, and what branches cost."""
    steps, branches = waterfall(report["history"]), report["branches"]
    rows = [("stages, on calibration images", _shown_steps(steps))] if steps else []
    if kept := report.get("kept_float"):
        reasons = {reason: [name for name, why in kept.items() if why == reason] for reason in kept.values()}
        kind = "float" if report["engine"].get("backend") == ONNXRUNTIME else "FP16"
        rows.append(
            (f"kept in {kind}", "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items()))
        )
    return [*rows, ("branches", _shown_branches(branches, report["engine"]))] if branches else rows


def _interval(fidelity: dict[str, Any]) -> str:
    if (interval := fidelity.get("sqnr_interval_db")) is None:  # unknown source images, or a report of an older version
        return ""
    low, high = interval
    return f" (95 %: {low:.1f} to {high:.1f}, {fidelity['sources']} source images)"


def _executed(engine: dict[str, Any]) -> str:
    """What the engine gave when it ran, or why it did not."""
    if not engine["executed"]:
        return f"no ({engine['not_executed']}): figures on accuracy are of ONNX Runtime"
    found = engine["fidelity"]
    agreement = "" if found["top1_agreement"] is None else f", top-1 agreement {found['top1_agreement']:.1%}"
    return f"yes, on {engine['device']}: SQNR {found['sqnr_db']:.1f} dB{_interval(found)}{agreement}"


def _traffic(engine: dict[str, Any]) -> str:
    """How many kernels the engine has and what they move at most, beside the float network in FP16."""
    found = engine["traffic"]
    if found["mb_per_image"] is None:
        return f"{engine['kernels']} kernels, which do not tell what they read and write"
    own = f"{engine['kernels']} kernels, at most {found['mb_per_image']:.1f} MB per image"
    if found["fp16_kernels"] is None:
        return f"{own} (batch {found['batch']}); no FP16 engine to compare with"
    return f"{own}; in FP16 {found['fp16_kernels']} and {found['fp16_mb_per_image']:.1f} MB (batch {found['batch']})"


def _proof(engine: dict[str, Any]) -> str:
    """What the engine's kernels show: INT8 convolutions are only planned where they do not tell."""
    _, planned_only = proven_and_planned(
        engine["backend"], engine["planned"], len(engine["lost"]), engine["int8_convs"]
    )
    convolutions = f"{engine['int8_convs']} INT8 convolutions{' planned, not proven' if planned_only else ''}"
    done, planned = engine["planned"] - len(engine["lost"]), engine["planned"]
    floats = [f"{engine[key]} {what}" for key, what in FLOAT_KERNELS.items() if engine[key]]
    return (
        f"{done} of {planned} layers: {engine['int8_gemms']} INT8 GEMMs, {convolutions}; "
        f"{engine['fused_attention']} fused attention kernels ({engine['int8_attention']} INT8); "
        f"beside them {', '.join(floats) or 'no GEMM or convolution'}"
    )


def _types(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What FP16 types cost beside FP32, of a graph that has them; a report of an older version has no other."""
    parity = report["parity"]
    if report.get("floats") == "fp32":
        return [("types beside INT8", f"FP32: {parity['golden_fp32_sqnr_db']:.1f} dB")]
    return [
        (
            "FP16 vs FP32 types",
            f"{parity['golden_fp16_sqnr_db']:.1f} vs {parity['golden_fp32_sqnr_db']:.1f} dB (golden images, mean)",
        )
    ]


def _agreement(parity: dict[str, Any]) -> str:
    """How near ONNX Runtime comes to the simulation in torch."""
    return f"{parity['torch_vs_ort_rel_l2']:.1e} relative L2, same integers in every layer but for ties"


def _kind(report: dict[str, Any]) -> str:
    """What was calibrated on: images, or samples of named inputs."""
    return report["calibration"].get("kind", "images")  # which a report of an older version lacks


def _checks(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What came of the limits that were given; a report of an older version knows none."""
    return list(report.get("acceptance", {}).get("checks", ()))


def boxes_found(fidelity: dict[str, Any]) -> str:
    """How well the boxes of the float network are found again."""
    if not fidelity["boxes"]:
        return "none to compare: the float network finds nothing on these images"
    moved = "" if fidelity["moved_px"] is None else f", the others moved by {fidelity['moved_px']:.1f} pixels (median)"
    return f"AP {fidelity['ap']:.3f}, at overlap .5 {fidelity['ap50']:.3f}; {fidelity['lost']} lost{moved}"


def equal_pictures(fidelity: dict[str, Any]) -> str:
    """How near pictures come to those of the float network."""
    ssim = "" if fidelity["ssim"] is None else f", SSIM {fidelity['ssim']:.4f}"
    return f"PSNR {fidelity['psnr_db']:.1f} dB{ssim}"


def _rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    fidelity, engine, parity, size = report["fidelity"], report["engine"], report["parity"], report["bytes"]
    speed, batch = report["speed"], report["speed"].get("batch", 8)  # which a report of an older version lacks
    rows = [
        ("weights", report["weights_source"]),
        ("calibrated on", f"{report['calibration']['count']} {_kind(report)}: {report['calibration']['source']}"),
        ("judged on", f"{fidelity['count']} {_kind(report)}: {report['evaluation']['source']}"),
        (
            "fidelity to float",
            f"SQNR {fidelity['sqnr_db']:.1f} dB{_interval(fidelity)}, cosine {fidelity['cosine']:.4f}",
        ),
    ]
    if len(fidelity.get("outputs", {})) > 1:  # which a report of an older version lacks
        each = ", ".join(f"{name} {db:.1f} dB" for name, db in fidelity["outputs"].items())
        rows.append(("its outputs", each))
    if fidelity["top1_agreement"] is not None:
        rows.append((f"top-1 agreement ({fidelity['top1_kind']})", f"{fidelity['top1_agreement']:.1%}"))
    if fidelity.get("psnr_db") is not None:  # which a report of an older version lacks
        rows.append(("to the float network's pictures", equal_pictures(fidelity)))
    if fidelity.get("boxes") is not None:
        rows.append((f"the float network's {fidelity['boxes']} boxes", boxes_found(fidelity)))
    if fidelity.get("true_ap") is not None:
        rows.append(("AP on annotations", f"{fidelity['true_ap']:.3f} (float {fidelity['reference_true_ap']:.3f})"))
    if fidelity["kl"] is not None:
        rows.append(("KL of class probabilities", f"{fidelity['kl']:.2g} nats"))
    if fidelity["top1"] is not None:
        rows.append(("top-1 accuracy", f"{fidelity['top1']:.2%} (float {fidelity['reference_top1']:.2%})"))
    return [
        *rows,
        *_repairs(report),
        ("simulation vs ONNX", _agreement(parity)),
        *_types(report),
        ("speed, ONNX Runtime CPU", f"{speed['ort_cpu_ratio']:.2f}x float (batch {batch}, {speed['threads']} threads)"),
        ("size", f"float {size['float_onnx'] / 1e6:.1f} MB, {MODEL} {size[MODEL] / 1e6:.1f} MB, "
                 f"engine {size[ENGINE] / 1e6:.1f} MB"),
        ("engine", f"{engine['backend']} {engine['version']} for {', '.join(engine['targets'])}"),
        *([("engine was run", _executed(engine))] if "executed" in engine else []),  # which an older report lacks
        *([("kernels, memory", _traffic(engine))] if "traffic" in engine else []),  # which an older report lacks
        ("INT8 proof", _proof(engine)),
        *[(each["limit"], f"{'PASS' if each['kept'] else 'FAIL'}: {each['measured']}") for each in _checks(report)],
        ("time, peak memory", f"{report['seconds']['total']:.0f} s, {report['peak_rss_mb']:.0f} MB"),
    ]  # fmt: skip


def print_report(report: dict[str, Any], folder: Path, stream: TextIO | None = None) -> None:
    """The one table, on `stream` (stdout by default), and every warning under it."""
    terminal = stream is None and os.isatty(1)
    console = Console(file=stream, highlight=False, width=None if terminal else TABLE_WIDTH)
    table = Table(
        title=escape(f"{report['model']}, recipe {report['recipe']}"), show_header=False, title_justify="left"
    )
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in _rows(report):
        table.add_row(key, escape(value))
    console.print(table)
    for warning in report["warnings"]:
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    console.print(f"written to {folder}", markup=False, soft_wrap=True)
