"""Which charts a package has the figures for."""

from collections.abc import Mapping
from dataclasses import dataclass

from deploy.engine.kernels import megabytes_per_image
from deploy.explain.kernel_list import KernelLists
from deploy.package import ENGINE, MODEL
from deploy.pages.charts import bars_chart, errors_chart, pairs_chart, steps_chart
from deploy.pages.kernels import groups
from deploy.pages.parts import Table
from deploy.pages.values import Figure, Values

MOST = 40  # blocks in a chart: those with the largest error


@dataclass(frozen=True)
class Picture:
    """A chart as a data URI, and what it shows in words."""

    uri: str
    alt: str


def _value(cell: tuple) -> float | None:
    """The figure in a cell of a table, or None."""
    return next((part.value for part in cell if isinstance(part, Figure)), None)


def waterfall_picture(report: Values, table: Table) -> Picture | None:
    """The stages of `waterfall_table`, and the whole network on the evaluation images."""
    if not table.rows:
        return None
    steps = [(str(row[0][0]), _value(row[1]), _value(row[2]) or 0.0) for row in table.rows]
    fidelity, last = report.part("fidelity"), None
    if fidelity.holds("sqnr_interval_db"):
        low, high = (fidelity.number("sqnr_interval_db", end) for end in (0, 1))
        last = (fidelity.number("sqnr_db"), low, high)
    return Picture(
        steps_chart(steps, last), "SQNR before and after every stage, and of the whole on the evaluation images"
    )


def blocks_picture(table: Table) -> Picture | None:
    """The errors of `blocks_table`."""
    blocks = [(str(row[0][0]), before, _value(row[3])) for row in table.rows if (before := _value(row[1]))]
    if not blocks:
        return None
    worst = {name for name, _, _ in sorted(blocks, key=lambda block: -block[1])[:MOST]}
    shown = [block for block in blocks if block[0] in worst and (block[2] is None or block[2] > 0)]
    return Picture(errors_chart(shown), "squared error of every block, in INT8 and with its branch")


def sensitive_picture(table: Table) -> Picture | None:
    """The costs of `sensitive_layers`."""
    points = [(str(row[0][0]), _value(row[1]) or 0.0) for row in table.rows]
    return Picture(bars_chart(points, "dB of the output", ".2f"), "cost of INT8 by layer") if points else None


def sizes_picture(report: Values) -> Picture:
    """The size of the float graph, the INT8 graph and the engine."""
    names: Mapping[str, str] = {"float graph": "float_onnx", "INT8 graph": MODEL, "engine": ENGINE}
    points = [(name, report.number("bytes", key) / 1e6) for name, key in names.items()]
    return Picture(bars_chart(points, "MB", ".1f"), "sizes of the float graph, the INT8 graph and the engine")


def traffic_picture(lists: KernelLists, batch: int) -> Picture:
    """What every group of kernels moves, beside the FP16 twin."""
    pairs = {
        group: [megabytes_per_image(kernels, batch) for kernels in found] for group, found in groups(lists).items()
    }
    sides = ("this engine", "FP16 twin") if lists.fp16 is not None else ("this engine",)
    return Picture(pairs_chart(pairs, sides, "MB per image, at most"), "MB per image by kind of kernel")
