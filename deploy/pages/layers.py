"""Layers and blocks: what stayed in FP16 and why, what INT8 costs where, and the branches."""

from deploy.pages.parts import Line, Row, Table, listed
from deploy.pages.values import Values, clipped

SENSITIVE = 12  # layers that are listed


def float_rows(report: Values) -> tuple[Row, ...]:
    """Every reason why layers stayed in FP16, with their names."""
    names_of: dict[str, list[str]] = {}
    for name, reason in report.reasons("float_layers").items():
        names_of.setdefault(reason, []).append(name)
    return tuple((listed(names), (reason,)) for reason, names in names_of.items())


def attention_rows(report: Values) -> tuple[Row, ...]:
    """What is known of attentions and of rounded shortcuts and products."""
    engine = report.part("engine")
    rows: list[Row] = []
    if engine.number("fused_attention"):
        fused, in_int8 = engine.figure("fused_attention"), engine.figure("int8_attention")
        rows.append(("fused attention kernels", (fused, ", in INT8 ", in_int8)))
    kinds = {"int8_products": "products written in INT8", "int8_shortcuts": "shortcuts in INT8"}
    for key, title in kinds.items():
        if report.holds(key) and report.count(key):
            rows.append((title, (listed(report.texts(key)),)))
    return tuple(rows)


def _detail(report: Values, name: str) -> Values | None:
    """The figures called `name` of the last stage that recorded them."""
    for index in reversed(range(report.count("history"))):
        if report.holds("history", index, "details", name):
            return report.part("history", index, "details", name)
    return None


def sensitive_layers(report: Values) -> Table:
    """What INT8 costs at the most sensitive layers, to first order; no rows where it was not recorded."""
    head, found = ("layer", "cost of INT8, dB of the output"), _detail(report, "cost_db")
    if found is None:
        return Table(head, ())
    names = sorted(found.names(), key=found.number, reverse=True)[:SENSITIVE]
    return Table(head, tuple(((clipped(name),), (found.figure(name, spec=".2f"),)) for name in names))


def _cells(branch: Values) -> tuple[Line, ...]:
    """What is known of a branch; training leaves out some of it."""
    specs = {"error_after": ".2e", "r2": ".3f", "r2_cv": ".3f", "kernels": "+.0f", "bytes": ".0f"}
    return tuple((branch.figure(key, spec=spec),) if branch.holds(key) else ("",) for key, spec in specs.items())


def blocks_table(report: Values) -> Table:
    """Every block that branches were tried at: the error of INT8 and the branch beside it. No rows if none was tried."""
    head = ("block", "error", "branch", "error with it", "R2, fitted", "R2, held out", "kernels", "bytes")
    branches, tried = report.part("branches"), _detail(report, "tried")
    chosen = dict(branches.parts())
    first = {} if tried is None else {name: forms.part(0) for name, forms in tried.parts() if forms.count()}
    rows = []
    for name in dict.fromkeys((*first, *chosen)):
        known = first.get(name) or chosen[name]
        error = (known.figure("error_before", spec=".2e"),) if known.holds("error_before") else ("",)
        if name in chosen:
            rows.append(((name,), error, (chosen[name].text("form"),), *_cells(chosen[name])))
        else:
            rows.append(((name,), error, ("none",), ("",), ("",), ("",), ("",), ("",)))
    return Table(head, tuple(rows))
