"""What a package is and what is known of it, in plain words: the first thing that page and card say."""

from dataclasses import dataclass

from deploy.engine.backends import ONNXRUNTIME
from deploy.package import ENGINE, MODEL, MODEL_FP32
from deploy.pages.contents import Contents
from deploy.pages.measured import agreement, executed_where, speed_ratio, sqnr
from deploy.pages.parts import Line, Row
from deploy.pages.values import Figure, Values
from deploy.report.proof import proven_and_planned

BAD, CARE, GOOD = "bad", "care", "good"


@dataclass(frozen=True)
class Verdict:
    """One sentence, the `headline`, what is behind it, and what is not shown. `level`: one of BAD, CARE and GOOD."""

    level: str
    headline: str
    points: tuple[Row, ...]
    limits: tuple[str, ...]


def _headline(contents: Contents) -> tuple[str, str]:
    """(level, sentence): the first reason not to put the package to use, or that there is none."""
    manifest, engine = contents.manifest, contents.report.part("engine")
    if manifest.flag("weights", "random"):
        return BAD, "Never to be served: its weights are random. It is for measuring latency alone."
    if contents.report.holds("acceptance") and not contents.report.flag("acceptance", "accepted"):
        return BAD, "Not to be served: it does not keep the limits that it was built for."
    if manifest.flag("calibration", "sample"):
        return BAD, "Not for production: it was calibrated on the built-in sample images."
    if not engine.holds("executed"):  # a report of an older version
        return CARE, "Whether the engine was ever run is not recorded: its accuracy was measured on its graph."
    if not engine.flag("executed"):
        return CARE, "Not yet run on a GPU: its accuracy was measured on its graph, in ONNX Runtime."
    if contents.report.count("warnings"):
        return CARE, "The engine was run and its accuracy measured; read the warnings before you use it."
    where = "CPU" if engine.text("backend") == ONNXRUNTIME else "GPU"
    return GOOD, f"The engine was run on a {where}, and its accuracy was measured there."


def _audit(engine: Values) -> tuple[int, int]:
    return proven_and_planned(
        engine.text("backend"), int(engine.number("planned")), engine.count("lost"), int(engine.number("int8_convs"))
    )


def int8_line(engine: Values) -> Line:
    """How many of the planned layers are proven INT8, planned only, or of a type that the engine does not tell."""
    proven, planned = _audit(engine)
    source = f"{engine.file.name}#/engine"
    line: Line = (Figure(f"{proven}", proven, source), " of ", engine.figure("planned"), " layers proven")
    if planned:
        line += (
            ", ", Figure(f"{planned}", planned, source),
            " planned only: the kernels of its convolutions are chosen on the GPU",
        )  # fmt: skip
    if lost := engine.count("lost"):
        line += (", ", Figure(f"{lost}", lost, source), " in no INT8 kernel")
    if engine.number("unproven"):
        line += (", ", engine.figure("unproven"), " products of unknown type")
    return line


def _limits_kept(report: Values) -> tuple[Row, ...]:
    """The limits that were given (deploy/acceptance.py), one row each."""
    if not report.holds("acceptance"):  # a report of an older version
        return ()
    found = []
    for _, check in report.parts("acceptance", "checks"):
        found.append((check.text("limit"), ("PASS: " if check.flag("kept") else "FAIL: ", check.text("measured"))))
    return tuple(found)


def _points(contents: Contents) -> tuple[Row, ...]:
    report, manifest = contents.report, contents.manifest
    engine, size = report.part("engine"), report.part("bytes")
    targets = ", ".join(engine.texts("targets"))
    return (
        ("what it is", (f"an engine of {engine.text('backend')} {engine.text('version')} for {targets}, with its graph",)),
        ("weights", (report.text("weights_source"),)),
        ("INT8", int8_line(engine)),
        ("engine was run", executed_where(engine)),
        ("SQNR to the float network", sqnr(report.part("fidelity"))),
        *agreement(report.part("fidelity")),
        *_limits_kept(contents.report),
        ("speed", speed_ratio(report.part("speed"))),
        ("size", (
            "float graph ", size.figure("float_onnx", spec=".1f", scale=1e-6, unit=" MB"),
            ", INT8 graph ", size.figure(MODEL, spec=".1f", scale=1e-6, unit=" MB"),
            ", engine ", size.figure(ENGINE, spec=".1f", scale=1e-6, unit=" MB"),
        )),
        ("layers that are not INT8", (_kept(report),)),
        ("built", (manifest.text("created"), ", by commit ", _commit(report))),
    )  # fmt: skip


def _kept(report: Values) -> str:
    kept = len(report.reasons("kept_float")) if report.holds("kept_float") else 0
    every = len(report.reasons("float_layers"))
    layers = f"{every} layer{'' if every == 1 else 's'}"
    return f"{layers}, {kept} of them because INT8 would cost too much" if kept else layers


def _commit(report: Values) -> str:
    return report.text("commit") if report.holds("commit") else "not known"


def _limits(contents: Contents) -> tuple[str, ...]:
    """What the figures do not show."""
    report, engine = contents.report, contents.report.part("engine")
    found = []
    if not engine.holds("executed") or not engine.flag("executed"):
        found.append(
            f"No figure here is of the engine's own outputs. Fidelity is that of {MODEL_FP32} in ONNX Runtime, which has "
            f"the same integers; kernels of a GPU add in another order and round to FP16 at other places."
        )
    if _audit(engine)[1]:
        found.append(
            "Convolutions planned for INT8 may run in another type: TensorRT-RTX chooses their kernels on the GPU, and the "
            "engine does not tell which."
        )
    found.append(
        "The speed is that of ONNX Runtime on a CPU. It says nothing about a GPU; make explain estimates that, and "
        "python -m benchmarks.gpu_latency measures it where there is one."
    )
    if report.flag("evaluation", "sample"):
        found.append("The images that judged are crops of a few photographs: the figures are indicative.")
    found.append(
        "Intervals are 95 % bootstrap intervals over source images, or for speed over rounds. They do not cover another "
        "kind of images or another machine."
    )
    return tuple(found)


def verdict(contents: Contents) -> Verdict:
    """The verdict on a package. Raises UserError where its files do not hold what it rests on."""
    return Verdict(*_headline(contents), _points(contents), _limits(contents))
