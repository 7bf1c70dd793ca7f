"""Puts the figures of benchmarks/results/ into README.md and docs/: `python -m benchmarks.readme`, so that none is typed.

A table compares its rows, so all of them must have been measured at one commit. Where they were not, nothing is written: the
command names the files and ends with exit code 1.
"""

import io
import re
import sys
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.tables.table import cell
from benchmarks.task_engines import RUNS as TASK_RUNS
from benchmarks.task_engines import TASKS
from deploy.package import RANDOM, read_json
from deploy.recipe import recipe_names
from deploy.report.proof import proven_and_planned
from deploy.report.terminal import boxes_found, equal_pictures, print_report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
SHOWN = "dinov2_s.int8.json"  # the report of the README's first command

Reports = Mapping[str, dict[str, Any]]  # by the name of the file


def reports(pattern: str = "*.int8.json") -> dict[str, dict[str, Any]]:
    """Return the checked-in results whose file names match `pattern`, by file name."""
    return {path.name: read_json(path) for path in sorted(RESULTS.glob(pattern))}


def recipe_reports() -> dict[str, dict[str, Any]]:
    """Return the reports of all recipes, by model and then in the order of `recipe_names`."""
    names = recipe_names()
    found = {name: report for recipe in names for name, report in reports(f"*.{recipe}.json").items()}
    return dict(sorted(found.items(), key=lambda item: (item[1]["model"], names.index(item[1]["recipe"]))))


def commits_differ(table: str, shown: Reports) -> str | None:
    """Return why the reports `shown` make no table, naming every file, or None if one commit measured them all."""
    by_commit: dict[str, list[str]] = {}
    for name, report in shown.items():
        by_commit.setdefault(str(report["commit"]), []).append(name)
    if len(by_commit) < 2:
        return None
    files = "; ".join(f"{commit}: {', '.join(names)}" for commit, names in sorted(by_commit.items()))
    return f"table '{table}' would mix {len(by_commit)} commits ({files}): measure them anew at one commit with `make bench`"


def shown_output(found: Reports) -> str:
    """Return the table that `make engine` prints."""
    report, stream = found[SHOWN], io.StringIO()
    print_report(report, Path("artifacts") / report["model"] / report["recipe"], stream)
    return "```text\n" + "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n```"


def sqnr(fidelity: dict[str, Any]) -> str:
    """Return the SQNR with its interval over source images, where the report has one."""
    text = f"{fidelity['sqnr_db']:.1f} dB"
    if not (interval := fidelity.get("sqnr_interval_db")):
        return text
    low, high = interval
    return f"{text} ({low:.1f} to {high:.1f})"


def judged_on(fidelity: dict[str, Any]) -> str:
    """Return how many images judged, and of how many source images they are crops, where the report tells."""
    text = f"{fidelity['count']} images"
    return f"{text} of {sources} sources" if (sources := fidelity.get("sources")) else text


def int8_layers(engine: dict[str, Any], kept_float: Collection[str] = ()) -> str:
    """Return how many layers run in INT8: proven by the engine's kernels, or planned where those do not tell.

    `kept_float`: layers that could have been, and stay in FP16.
    """
    proven, planned_only = proven_and_planned(
        engine["backend"], engine["planned"], len(engine["lost"]), engine["int8_convs"]
    )
    planned = f", {planned_only} planned" if planned_only else ""
    return f"{proven} of {engine['planned']} proven{planned}" + (
        f", {len(kept_float)} kept in FP16" if kept_float else ""
    )


def _megabytes(engine: dict[str, Any]) -> str:
    """What kernels move per image at most, beside FP16, where the report tells."""
    found = engine.get("traffic")
    if not found:
        return ""
    return f"{found['mb_per_image']:.0f}" + (
        f" (FP16 {found['fp16_mb_per_image']:.0f})" if found["fp16_mb_per_image"] is not None else ""
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def _source(shown: Reports, command: str = "make bench") -> str:
    commits = sorted({report["commit"] for report in shown.values()})
    machines = (report["machine"] for report in shown.values())
    where = ", ".join(sorted({f"{machine['cores']} cores ({machine['processor']})" for machine in machines}))
    interval = any(report["fidelity"].get("sqnr_interval_db") for report in shown.values())
    brackets = " In brackets: the interval over source images." if interval else ""
    mixed = " Networks of different commits are not comparable." if len(commits) > 1 else ""
    return f"Measured by `{command}` at commit {', '.join(commits)} on {where}.{mixed}{brackets}"


def results_table(found: Reports) -> str:
    """Return one row per model, and where the figures come from."""
    head = [
        "model",
        "SQNR to float",
        "judged on",
        "top-1 agreement",
        "speed on CPU",
        "INT8 layers",
        "engine",
        "MB per image",
        "time",
    ]
    rows = [
        [
            report["model"],
            sqnr(fidelity := report["fidelity"]),
            judged_on(fidelity),
            f"{fidelity['top1_agreement']:.1%}",
            f"{report['speed']['ort_cpu_ratio']:.2f}x",
            int8_layers(engine := report["engine"], report["kept_float"]),
            f"{engine['kernels']} kernels, {engine['bytes'] / 1e6:.1f} MB",
            _megabytes(engine),
            f"{report['seconds']['total']:.0f} s",
        ]
        for report in found.values()
    ]
    return f"{_table(head, rows)}\n\n{_source(found)}"


def recipes_table(found: Reports) -> str:
    """Return one row per model and recipe."""
    head = [
        "model", "recipe", "SQNR to float", "judged on", "top-1 agreement", "kernels", "MB per image", "engine",
        "INT8 attentions", "branches", "time",
    ]  # fmt: skip
    rows = [
        [
            report["model"],
            f"`{report['recipe']}`",
            sqnr(fidelity := report["fidelity"]),
            judged_on(fidelity),
            f"{fidelity['top1_agreement']:.1%}",
            str((engine := report["engine"])["kernels"]),
            _megabytes(engine),
            f"{engine['bytes'] / 1e6:.1f} MB",
            str(len(report["int8_attention"])),
            str(len(report["branches"])),
            f"{report['seconds']['total']:.0f} s",
        ]
        for report in found.values()
    ]
    return f"{_table(head, rows)}\n\n{_source(found)}"


def task_reports() -> dict[str, dict[str, Any]]:
    """Return the reports of `benchmarks.task_engines`, in the order of its runs."""
    return {name: read_json(path) for name in TASK_RUNS if (path := TASKS / f"{name}.json").exists()}


def as_its_task_judges(fidelity: dict[str, Any]) -> str:
    """Return how near INT8 comes to the float network as its task judges: boxes, pictures, features or classes."""
    if fidelity["psnr_db"] is not None:
        return equal_pictures(fidelity)
    if fidelity["boxes"]:
        return f"{boxes_found(fidelity)}, of {fidelity['boxes']}"
    same = "" if fidelity["top1_agreement"] is None else f", {fidelity['top1_kind']} {fidelity['top1_agreement']:.1%}"
    return f"cosine {fidelity['cosine']:.4f}{same}"


def tasks_table(found: Reports) -> str:
    """Return one row per network and recipe of `benchmarks.task_engines`."""
    head = [
        "network", "recipe", "SQNR to float", "as its task judges", "judged on", "INT8 layers", "kernels", "MB per image",
        "branches",
    ]  # fmt: skip
    rows = [
        [
            report["network"],
            ", ".join((f"`{report['recipe']}`", *(f"`{check['limit']}`" for check in report["acceptance"]["checks"]))),
            sqnr(fidelity := report["fidelity"]),
            as_its_task_judges(fidelity),
            f"{fidelity['count']} {report['calibration'].get('kind', 'images')}",
            int8_layers(engine := report["engine"], report["kept_float"]),
            f"{engine['kernels']} (FP16 {engine['traffic']['fp16_kernels']})",
            _megabytes(engine),
            str(len(report["branches"])),
        ]
        for report in found.values()
    ]
    return f"{_table(head, rows)}\n\n{_source(found, 'python -m benchmarks.task_engines')}"


def _paper(result: dict[str, Any]) -> str:
    """Return the tool's own rows of one paper's table: SQNR and agreement by network, no published number among them."""
    models = list(result["models"])
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in result["rows"]:
        cells.setdefault((row["bits"], row["method"]), {})[row["model"]] = cell(row)
    order = list(dict.fromkeys(bits for bits, _ in cells))
    rows = [
        [bits, method, *(by_model.get(model, "") for model in models)]
        for (bits, method), by_model in sorted(cells.items(), key=lambda item: order.index(item[0][0]))
    ]
    counts = sorted({result["models"][model]["evaluation"]["count"] for model in models})
    judges = " or ".join(str(count) for count in counts)
    source = f"Measured by `{result['command']}` at commit {result['commit']}; judged on {judges} images."
    notes = "\n".join(f"- {note}" for note in result["notes"])
    head = ["bits", "method", *models]
    return f"### PAPER={result['paper']}\n\n{result['title']}\n\n{_table(head, rows)}\n\n{source}\n\n{notes}"


def papers_tables(found: Reports) -> str:
    """Return one table per paper."""
    return "\n\n".join(_paper(result) for result in found.values())


def serving_table(found: Reports) -> str:
    """Return one row for each package that `benchmarks.serving_load` asked a server for, and where the figures come from."""
    (report,) = found.values()
    head = [
        "model", "equal over HTTP", "equal over gRPC", "clients", "requests", "wrong", "lost", "images/s", "median", "p99",
        "change of the server's memory",
    ]  # fmt: skip
    rows = []
    for row in report["rows"]:
        loads = {f"{(first := row['load'])['clients']}, for {first['seconds']:.0f} s": first}
        if "many" in row:
            loads[f"{first['clients']}"] = row["many"]
        for clients, each in loads.items():
            memory = f"{each['growth_mb']:+.0f} MB" if "growth_mb" in each else ""
            rows.append([
                row["model"], row["equal_over_http"], row["equal_over_grpc"], clients, str(each["requests"]),
                str(each["wrong"]), str(each["lost"]), f"{each['images_s']:.0f}", f"{each['p50_ms']:.1f} ms",
                f"{each['p99_ms']:.1f} ms", memory,
            ])  # fmt: skip
    machine = report["machine"]
    where = f"{machine['cores']} cores ({machine['processor']}), which clients and server share"
    return f"{_table(head, rows)}\n\nMeasured by `{report['command']}` at commit {report['commit']} on {where}."


def cpu_speed_table(found: Reports) -> str:
    """Return one table for each result: time of the float graph over that of INT8 graphs, and the published ratios."""
    ours = {"float/integer": "this tool", "float/plain": "this tool, graph with Q/DQ"}
    tables = []
    for result in found.values():
        pairs = [pair for pair in result["rows"][0]["ratios"] if pair.startswith("float/")]
        order = [*ours, *(pair for pair in pairs if pair not in ours)]
        published = any(row["published"] for row in result["rows"])
        head = ["network", "recipe", "threads", "batch", *(["published"] if published else [])]
        head += [*(ours.get(pair, pair.removeprefix("float/")) for pair in order), "agreement of our graphs"]
        rows = []
        for row in result["rows"]:
            about = [row["model"].removesuffix(RANDOM), f"`{row['recipe']}`", str(row["threads"]), str(row["batch"])]
            about += [f"{row['published']:.2f}" if row["published"] else ""] if published else []
            times = [row["ratios"][pair] for pair in order]
            about += [f"{each['ratio']:.2f} ({each['low']:.2f} to {each['high']:.2f})" for each in times]
            rows.append([*about, f"{row['agreement_db']:.0f} dB"])
        where = f"{result['machine']['cores']} cores ({result['machine']['processor']})"
        source = f"Measured by `{result['command']}` at commit {result['commit']} on {where}."
        tables.append(f"{_table(head, rows)}\n\n{source}")
    return "\n\n".join(tables)


# file -> block -> (the reports it shows, what makes its text of them, whether it is one table)
Block = tuple[Callable[[], Reports], Callable[[Reports], str], bool]
BLOCKS: dict[str, dict[str, Block]] = {
    "README.md": {
        "output": (lambda: reports(SHOWN), shown_output, True),
        "results": (reports, results_table, True),
    },
    "docs/methods.md": {"recipes": (recipe_reports, recipes_table, True)},
    "docs/models.md": {"tasks": (task_reports, tasks_table, False)},
    "docs/serving.md": {"load": (lambda: reports("serving.json"), serving_table, True)},
    "docs/papers.md": {
        "papers": (lambda: reports("table.*.json"), papers_tables, False),
        "speed": (lambda: reports("cpu_speed.*.json"), cpu_speed_table, False),
    },
}


def refusals() -> list[str]:
    """Return why the tables must not be written, one line for each that mixes commits.

    The table of tasks compares the recipes of each network, so it is as many tables as it has networks.
    """
    tables: dict[str, dict[str, Any]] = {
        name: dict(shown()) for blocks in BLOCKS.values() for name, (shown, _, one_table) in blocks.items() if one_table
    }
    for name, report in task_reports().items():
        tables.setdefault(f"tasks, {report['network']}", {})[name] = report
    return [reason for name, shown in tables.items() if (reason := commits_differ(name, shown))]


def _between(content: str, marks: re.Match[str]) -> str:
    return marks[1] + content + marks[2]


def rendered(file: str, text: str) -> str:
    """Return `text`, of the file named, with all between its `<!-- name -->` and `<!-- /name -->` marks made anew."""
    for name, (shown, make, _) in BLOCKS[file].items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(pattern, partial(_between, make(shown()) + "\n"), text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{file} has {count} places for '{name}', expected 1")
    return text


def main() -> int:
    """Write all blocks, or none; returns the exit code."""
    if reasons := refusals():
        for reason in reasons:
            print(f"failed: {reason}; nothing was written", file=sys.stderr)
        return 1
    fresh = {file: rendered(file, (ROOT / file).read_text()) for file in BLOCKS}
    for file, text in fresh.items():
        (ROOT / file).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
