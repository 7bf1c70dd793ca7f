"""Charts as data URIs of SVG, drawn with matplotlib.

A chart is an image of its own, not a part of the page's HTML: nothing in it can run, whatever a layer is called, and its
names do not meet those of other charts. Every chart repeats figures of a table beside it.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, ROW = 4.4, 0.24  # inches: of a chart, and of one of its rows
LONGEST = 30  # characters of a name
INT8, FP16, TEXT = "#1f5fa8", "#a9b4c0", "#1a1a1a"
GAIN, LOSS = "#2f7d4f", "#b23b3b"
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "report",  # the same figures give the same file
    "text.parse_math": False,  # a name with dollar signs is no formula
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
}

Points = Sequence[tuple[str, float]]


def _short(name: str) -> str:
    """The end of a long name, which tells layers apart."""
    return name if len(name) <= LONGEST else f"...{name[3 - LONGEST :]}"


class _Chart:
    """A chart with one row for every name, the first on top: `with _Chart(names, "MB") as chart: chart.axes...`."""

    def __init__(self, names: Sequence[str], label: str) -> None:
        self.names, self.label = names, label

    def __enter__(self) -> "_Chart":
        import matplotlib
        from matplotlib.figure import Figure

        self.style = matplotlib.rc_context(STYLE)
        self.style.__enter__()
        self.figure = Figure(figsize=(WIDTH, 0.6 + ROW * max(len(self.names), 1)), layout="constrained")
        self.axes: Axes = self.figure.add_subplot()
        self.axes.set_yticks(range(len(self.names)), [_short(name) for name in self.names])
        self.axes.set_ylim(len(self.names) - 0.4, -0.6)
        self.axes.set_xlabel(self.label)
        self.axes.tick_params(axis="y", length=0)
        self.axes.grid(axis="x", color="#e4e4e4", linewidth=0.6)
        self.axes.set_axisbelow(True)
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        held = io.BytesIO()
        if kind is None:
            self.figure.savefig(held, format="svg", metadata={"Date": None, "Creator": None})
        self.style.__exit__(kind, *rest)
        self.uri = f"data:image/svg+xml;base64,{base64.b64encode(held.getvalue()).decode()}"


def _ends(axes: "Axes", values: Sequence[float], spec: str) -> None:
    """Write each value at the end of its bar, with room for it."""
    for row, value in enumerate(values):
        axes.annotate(f"{value:{spec}}", (max(value, 0), row), xytext=(3, 0), textcoords="offset points", va="center")
    axes.set_xlim(min(0, *values), max(0, *values) * 1.22 or None)


def bars_chart(points: Points, label: str, spec: str) -> str:
    """A bar for every (name, value), with the value at its end."""
    names, values = [name for name, _ in points], [value for _, value in points]
    with _Chart(names, label) as chart:
        chart.axes.barh(range(len(values)), values, height=0.62, color=INT8)
        _ends(chart.axes, values, spec)
    return chart.uri


def pairs_chart(pairs: Mapping[str, Sequence[float]], labels: Sequence[str], axis: str) -> str:
    """For every name a bar for this engine, and one below it for its twin where there is a second value."""
    with _Chart([*pairs], axis) as chart:
        for side, (label, colour) in enumerate(zip(labels, (INT8, FP16), strict=False)):
            rows = [row + (0.2 * (2 * side - 1) if len(labels) > 1 else 0) for row in range(len(pairs))]
            chart.axes.barh(rows, [found[side] for found in pairs.values()], height=0.38, color=colour, label=label)
        chart.axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)
    return chart.uri


def steps_chart(steps: Sequence[tuple[str, float | None, float]], last: tuple[float, float, float] | None) -> str:
    """From (name, dB before, dB after) an arrow for every stage; `last`: (dB, low, high) of the whole on other images."""
    names = [name for name, _, _ in steps] + (["evaluation images"] if last else [])
    with _Chart(names, "SQNR to the float network, dB") as chart:
        axes = chart.axes
        for row, (_, before, after) in enumerate(steps):
            colour = GAIN if before is None or after >= before else LOSS
            if before is not None:
                axes.plot([before, after], [row, row], color=colour, linewidth=4, solid_capstyle="butt")
            axes.plot(after, row, "o", color=colour, markersize=5)
            text = f"{after:.1f}" if before is None else f"{after - before:+.2f}"
            axes.annotate(
                text, (max(after, before or after), row), xytext=(6, 0), textcoords="offset points", va="center"
            )
        if last:
            value, low, high = last
            axes.plot([low, high], [len(steps)] * 2, color=INT8, linewidth=1.5)
            axes.plot(value, len(steps), "D", color=INT8, markersize=5)
            axes.annotate(f"{value:.1f}", (high, len(steps)), xytext=(6, 0), textcoords="offset points", va="center")
        axes.margins(x=0.14)
    return chart.uri


def errors_chart(blocks: Sequence[tuple[str, float, float | None]]) -> str:
    """From (block, error, error with a branch or None) a hollow and a filled dot for every block, on a logarithmic axis."""
    with _Chart([name for name, _, _ in blocks], "squared error per sample (logarithmic)") as chart:
        axes = chart.axes
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        rows = [row for row, (_, _, after) in enumerate(blocks) if after is not None]
        after = [each for _, _, each in blocks if each is not None]
        axes.plot([before for _, before, _ in blocks], range(len(blocks)), "o", color=FP16, label="INT8", markersize=6)
        axes.plot(after, rows, "o", color=INT8, label="with its branch", markersize=4)
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)
    return chart.uri
