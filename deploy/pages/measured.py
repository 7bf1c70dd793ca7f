"""What was measured: fidelity, speed, parity, and the images that it was measured with."""

from deploy.pages.parts import Line, Row, Table
from deploy.pages.values import Values, clipped


def sqnr(fidelity: Values) -> Line:
    """The SQNR with its interval, where the source images are known."""
    line: Line = (fidelity.figure("sqnr_db", spec=".1f", unit=" dB"),)
    if not fidelity.holds("sqnr_interval_db"):
        return (*line, " (no interval: it needs the source image of every image)")
    low, high = (fidelity.figure("sqnr_interval_db", end, spec=".1f") for end in (0, 1))
    return (
        *line, " (95 %: ", low, " to ", high, ") on ", fidelity.figure("count"), " images of ", fidelity.figure("sources"),
        " sources",
    )  # fmt: skip


def agreement(fidelity: Values) -> tuple[Row, ...]:
    """Agreement of the top-1 result and accuracy on labels, where they were measured."""
    rows: list[Row] = []
    if fidelity.holds("top1_agreement"):
        kind = fidelity.text("top1_kind")
        rows.append((f"top-1 agreement ({kind})", (fidelity.figure("top1_agreement", spec=".1%"),)))
    if fidelity.holds("top1") and fidelity.holds("reference_top1"):
        float_top1 = fidelity.figure("reference_top1", spec=".2%")
        rows.append(("top-1 accuracy", (fidelity.figure("top1", spec=".2%"), ", the float network ", float_top1)))
    return tuple(rows)


def pictures_and_boxes(fidelity: Values) -> tuple[Row, ...]:
    """How near pictures come to the float network's, and how well its boxes are found again, where there are any."""
    rows: list[Row] = []
    if fidelity.holds("psnr_db") and fidelity.holds("ssim"):
        psnr, ssim = fidelity.figure("psnr_db", spec=".1f", unit=" dB"), fidelity.figure("ssim", spec=".4f")
        rows.append(("to the float network's pictures", ("PSNR ", psnr, ", SSIM ", ssim)))
    if fidelity.holds("ap") and fidelity.holds("ap50"):
        every, half = fidelity.figure("ap", spec=".3f"), fidelity.figure("ap50", spec=".3f")
        rows.append(("AP of the boxes, the float network's being true", (every, ", at overlap .5 ", half)))
        lost: Line = (fidelity.figure("lost"), " of ", fidelity.figure("boxes"))
        rows.append(("boxes lost", lost))
    if fidelity.holds("true_ap") and fidelity.holds("reference_true_ap"):
        of_float = fidelity.figure("reference_true_ap", spec=".3f")
        rows.append(("AP on annotations", (fidelity.figure("true_ap", spec=".3f"), ", the float network ", of_float)))
    if fidelity.holds("moved_px"):
        rows.append(
            ("sides of the others moved by", (fidelity.figure("moved_px", spec=".1f", unit=" pixels (median)"),))
        )
    return tuple(rows)


def executed_where(engine: Values) -> Line:
    """Where the engine was run, or why it was not."""
    if not engine.holds("executed"):
        return ("not recorded",)
    if not engine.flag("executed"):
        return (f"no: {engine.text('not_executed')}",)
    return (f"yes, on {engine.text('device')}",)


def speed_ratio(speed: Values) -> Line:
    """How much faster than float, with its interval, and where."""
    measured = speed.part("ort_cpu")
    low, high = measured.figure("low", spec=".2f"), measured.figure("high", spec=".2f")
    return (
        measured.figure("ratio", spec=".2f", unit="x float"), " (95 %: ", low, " to ", high,
        ") in ONNX Runtime on a CPU with ", speed.figure("threads"), " threads",
    )  # fmt: skip


def fidelity_rows(report: Values) -> tuple[Row, ...]:
    """Fidelity to the float network: of the graph, and of the engine where it was run."""
    graph = report.part("fidelity")
    rows: list[Row] = [
        ("SQNR of the graph", sqnr(graph)),
        ("cosine similarity, mean", (graph.figure("cosine", spec=".5f"),)),
        *agreement(graph),
        *pictures_and_boxes(graph),
    ]
    if graph.holds("kl"):
        rows.append(("KL of class probabilities", (graph.figure("kl", spec=".2g", unit=" nats"),)))
    if graph.holds("outputs") and graph.count("outputs") > 1:
        for name in graph.names("outputs"):
            rows.append((f"SQNR of output {clipped(name)}", (graph.figure("outputs", name, spec=".1f", unit=" dB"),)))
    engine = report.part("engine")
    if engine.holds("executed") and engine.flag("executed"):
        rows.append((f"SQNR of the engine on {engine.text('device')}", sqnr(engine.part("fidelity"))))
    return tuple(rows)


def parity_rows(report: Values) -> tuple[Row, ...]:
    """How far simulation and graphs agree, on the golden images."""
    parity = report.part("parity")
    fp16, fp32 = (parity.figure(f"golden_{kind}_sqnr_db", spec=".1f", unit=" dB") for kind in ("fp16", "fp32"))
    return (
        ("simulation against graph", (
            parity.figure("torch_vs_ort_rel_l2", spec=".1e"), " relative L2 on ", parity.figure("images"),
            " images, layer by layer: the same integers but for ties",
        )),
        ("graph with FP32 types alone", (fp32, " (mean over the golden images)"))
        if report.holds("floats") and report.text("floats") == "fp32"
        else ("graph with FP16 types", (fp16, ", with FP32 types ", fp32, " (mean over the golden images)")),
    )  # fmt: skip


def waterfall_table(report: Values) -> Table:
    """The stages that the judge measured; no rows if there are none."""
    rows = []
    for index in range(report.count("waterfall")):
        step = report.part("waterfall", index)
        before = (step.figure("sqnr_before_db", spec=".2f"),) if step.holds("sqnr_before_db") else ("",)
        gain = (step.figure("gain_db", spec="+.2f"),) if step.holds("gain_db") else ("",)
        rows.append(((step.text("step"),), before, (step.figure("sqnr_after_db", spec=".2f"),), gain))
    return Table(("stage", "before, dB", "after, dB", "gain, dB"), tuple(rows))


def notes(report: Values) -> tuple[Row, ...]:
    """What every stage said of itself."""
    history = [report.part("history", index) for index in range(report.count("history"))]
    return tuple((each.text("stage"), ("; ".join(each.texts("notes")),)) for each in history if each.count("notes"))


def speed_rows(report: Values) -> tuple[Row, ...]:
    """Times of both, and how they were measured."""
    speed, machine = report.part("speed"), report.part("machine")
    measured = speed.part("ort_cpu")
    instructions = ", ".join(machine.texts("int8_instructions")) or "none"
    return (
        ("float against INT8", speed_ratio(speed)),
        ("time of a batch", (
            "float ", measured.figure("baseline_ms", spec=".1f", unit=" ms"),
            ", INT8 ", measured.figure("candidate_ms", spec=".1f", unit=" ms"),
        )),
        ("how", (
            *(("a batch of ", speed.figure("batch"), " golden images, ") if speed.holds("batch") else ()),
            "both graphs in turn, median of ",
            measured.figure("rounds"), " rounds; ", speed.figure("ort_int8_layers"), " layers ran in INT8 kernels",
        )),
        ("machine", (
            f"{machine.text('processor')}, ", machine.figure("cores"), f" cores; INT8 instructions: {instructions}",
        )),
    )  # fmt: skip


def _images(report: Values, role: str) -> Line:
    images = report.part(role)
    kind = images.text("kind") if images.holds("kind") else "images"  # which a report of an older version lacks
    return (images.figure("count"), f" {kind} of ", images.figure("sources"), f" sources: {images.text('source')}")


def calibration_rows(report: Values) -> tuple[Row, ...]:
    """The images of both roles, and how far the first cover the second."""
    coverage, fits = report.part("coverage"), report.part("fp16_range")
    rows: list[Row] = [(f"{role} images", _images(report, role)) for role in ("calibration", "evaluation")]
    if coverage.holds("spread"):
        rows.append((
            "ranges from one half of the images or the other",
            (
                "differ by a factor ", coverage.figure("spread", "median", spec=".2f"), " in the middle of all layers, ",
                coverage.figure("spread", "worst", spec=".2f"), f" in {coverage.text('spread', 'worst_layer')}",
            ),
        ))  # fmt: skip
    rows.append((
        "largest value in FP16",
        (
            fits.figure("largest", spec=".4g"), f" in {fits.text('module')}: fits ",
            fits.figure("headroom", spec=".0f"), " times over",
        ),
    ))  # fmt: skip
    return tuple(rows)


def outside_table(report: Values) -> Table:
    """The layers that clip most of what they read on evaluation images."""
    coverage = report.part("coverage")
    rows = [
        (
            (each.text("layer"),),
            (each.figure("fraction", spec=".2g", scale=100, unit="%"),),
            (each.figure("largest", spec=".2f"),),
        )
        for _, each in coverage.parts("outside")
    ]
    return Table(("layer", "clipped", "largest value / threshold"), tuple(rows))
