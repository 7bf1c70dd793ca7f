"""Puts the figures of benchmarks/results/ into the README, so that none is typed: `python -m benchmarks.readme`."""

import io
import re
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.tables.table import cell
from deploy.package import read_json
from deploy.recipe import recipe_names
from deploy.report.terminal import print_report

ROOT = Path(__file__).parents[1]
SHOWN = "dinov2_s"  # the model of the README's first command


def reports(recipe: str = "int8") -> dict[str, dict[str, Any]]:
    """The checked-in reports of a recipe by model."""
    found = (read_json(path) for path in sorted((ROOT / "benchmarks/results").glob(f"*.{recipe}.json")))
    return {report["model"]: report for report in found}


def shown_output(report: dict[str, Any]) -> str:
    """The table that `make engine` prints."""
    stream = io.StringIO()
    print_report(report, Path("artifacts") / report["model"] / report["recipe"], stream)
    return "```text\n" + "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n```"


def _row(report: dict[str, Any]) -> str:
    fidelity, engine = report["fidelity"], report["engine"]
    cells = (
        report["model"],
        f"{fidelity['sqnr_db']:.1f} dB",
        f"{fidelity['top1_agreement']:.1%}",
        f"{report['speed']['ort_cpu_ratio']:.2f}x",
        f"{engine['planned'] - len(engine['lost'])} of {engine['planned']}",
        f"{engine['kernels']}",
        f"{engine['bytes'] / 1e6:.1f} MB",
        f"{report['seconds']['total']:.0f} s",
    )
    return f"| {' | '.join(cells)} |"


def results_table(found: dict[str, dict[str, Any]]) -> str:
    """One row per model, and where the figures come from."""
    head = "| model | SQNR | top-1 agreement | speed on CPU | INT8 layers in the engine | kernels | engine | time |"
    commits = ", ".join(sorted({report["commit"] for report in found.values()}))
    machines = (report["machine"] for report in found.values())
    where = ", ".join(sorted({f"{machine['cores']} cores ({machine['processor']})" for machine in machines}))
    source = f"Measured by `make bench` at commit {commits} on {where}."
    return "\n".join([head, "|---" * 8 + "|", *map(_row, found.values()), "", source])


def repairs_table() -> str:
    """One row per run of another recipe than the default, after the default's of the same model."""
    head = "| model | recipe | SQNR | top-1 agreement | kernels | engine | INT8 attentions | branches |"
    rows, commits = [], set()
    for recipe in recipe_names():  # the default, the shortest name, comes first
        for report in reports(recipe).values():
            fidelity, engine = report["fidelity"], report["engine"]
            cells = (
                report["model"], f"`{recipe}`", f"{fidelity['sqnr_db']:.1f} dB", f"{fidelity['top1_agreement']:.1%}",
                f"{engine['kernels']}", f"{engine['bytes'] / 1e6:.1f} MB", f"{len(report['int8_attention'])}",
                f"{len(report['branches'])}",
            )  # fmt: skip
            rows.append((report["model"], f"| {' | '.join(cells)} |"))
            commits.add(report["commit"])
    rows.sort(key=lambda row: row[0])
    where = ", ".join(sorted(commits))
    source = f"Measured by `make bench` at commit {where}."
    return "\n".join([head, "|---" * 8 + "|", *(row for _, row in rows), "", source])


def papers_table() -> str:
    """Our rows of the papers' tables that are checked in: SQNR and agreement by network, no published number among them."""
    found = [read_json(path) for path in sorted((ROOT / "benchmarks/results").glob("table.*.json"))]
    models = sorted({row["model"] for result in found for row in result["rows"]})
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for result in found:
        for row in result["rows"]:
            cells.setdefault((row["bits"], row["method"]), {})[row["model"]] = cell(row)
    order = list(dict.fromkeys(bits for bits, _ in cells))
    rows = [
        f"| {bits} | {method} | {' | '.join(by_model.get(model, '') for model in models)} |"
        for (bits, method), by_model in sorted(cells.items(), key=lambda item: order.index(item[0][0]))
    ]
    sources = sorted({f"`{result['command']}` at commit {result['commit']}" for result in found})
    head = f"| bits | method | {' | '.join(models)} |"
    return "\n".join([head, "|---" * (2 + len(models)) + "|", *rows, "", f"Measured by {', '.join(sources)}."])


def _between(content: str, marks: re.Match[str]) -> str:
    return marks[1] + content + marks[2]


def rendered(readme: str) -> str:
    """`readme` with everything between its `<!-- name -->` and `<!-- /name -->` marks made anew."""
    found = reports()
    contents = {
        "output": shown_output(found[SHOWN]),
        "results": results_table(found),
        "repairs": repairs_table(),
        "papers": papers_table(),
    }
    for name, content in contents.items():
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
        readme, count = re.subn(pattern, partial(_between, content), readme, flags=re.DOTALL)
        assert count == 1, f"the README has {count} places for '{name}'"
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(rendered(path.read_text()))
