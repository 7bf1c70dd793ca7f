"""Pictures of what `benchmarks.gpu_latency` measured: time against accuracy, and images per second against time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.pages.charts import STYLE

SIZE = (6.4, 4.0)  # inches


def _saved(figure: Any, file: Path) -> Path:
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file


def write_charts(found: Mapping[str, Any], beside: Path) -> list[Path]:
    """Draw the rows of a result; the files, named after `beside`, that were written.

    Time against accuracy only has the engines that were compared with golden images.
    """
    import matplotlib
    from matplotlib.figure import Figure

    where = (
        f"{found['model']} on {found['machine'].get('gpu') or 'this machine'}, {found['backend']} {found['version']}"
    )
    written = []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot(title=where, xlabel="time of a batch (ms, median)", ylabel="images per second")
        for name in found["plans"]:
            rows = [(row["batch"], row["engines"][name]) for row in found["batches"]]
            axes.plot([row["median_ms"] for _, row in rows], [row["images_s"] for _, row in rows], "o-", label=name)
            for batch, row in rows:
                axes.annotate(
                    f"{batch}", (row["median_ms"], row["images_s"]), xytext=(4, 4), textcoords="offset points"
                )
        axes.set_xscale("log")
        axes.legend(frameon=False)
        written.append(_saved(figure, beside.with_suffix(".throughput.svg")))

        judged = {
            name: plan["golden_sqnr_db"] for name, plan in found["plans"].items() if plan["golden_sqnr_db"] is not None
        }
        if judged:
            figure = Figure(figsize=SIZE, layout="constrained")
            label = "SQNR of the golden images to the float network (dB)"
            axes = figure.add_subplot(title=where, xlabel="time per image (ms, median)", ylabel=label)
            for row in found["batches"]:
                x = [row["engines"][name]["median_ms"] / row["batch"] for name in judged]
                axes.plot(x, [*judged.values()], "o", label=f"batch {row['batch']}")
                for name, at in zip(judged, x, strict=True):
                    axes.annotate(name, (at, judged[name]), xytext=(4, 4), textcoords="offset points")
            axes.set_xscale("log")
            axes.legend(frameon=False)
            written.append(_saved(figure, beside.with_suffix(".accuracy.svg")))
    return written
