"""The sections of the page, in order: each a heading, a sentence and blocks of rows, tables, charts, images and code."""

from dataclasses import dataclass
from typing import Any

from deploy.pages.contents import Contents
from deploy.pages.examples import examples
from deploy.pages.kernels import counts_table, groups_table, largest_table
from deploy.pages.layers import attention_rows, blocks_table, float_rows, sensitive_layers
from deploy.pages.measured import (
    calibration_rows,
    fidelity_rows,
    notes,
    outside_table,
    parity_rows,
    speed_rows,
    waterfall_table,
)
from deploy.pages.origin import (
    command,
    environment_rows,
    files_table,
    identity_rows,
    interface_table,
    settings_rows,
    usual_batch,
)
from deploy.pages.parts import Table
from deploy.pages.pictures import (
    blocks_picture,
    sensitive_picture,
    sizes_picture,
    traffic_picture,
    waterfall_picture,
)
from deploy.pages.values import clipped

ROWS, TABLE, PICTURE, EXAMPLES, CODE = "rows", "table", "picture", "examples", "code"
Block = tuple[str, Any]  # one of these kinds, and what it holds


@dataclass(frozen=True)
class Section:
    """`intro`: a sentence on how to read it. Blocks that hold nothing are left out."""

    title: str
    intro: str
    blocks: tuple[Block, ...]


def _section(title: str, intro: str, *blocks: Block) -> Section:
    held = [(kind, what) for kind, what in blocks if (what.rows if isinstance(what, Table) else what)]
    return Section(title, intro, tuple(held))


def _accuracy(contents: Contents) -> Section:
    table = waterfall_table(contents.report)
    return _section(
        "Accuracy",
        "SQNR is the signal-to-quantization-noise ratio at the network's output, against the float network. A stage is "
        "measured on calibration images that it was not fitted on, with networks fitted on half of them: compare gains, as "
        "the figure before a stage is not exactly the figure after the stage before it.",
        (ROWS, fidelity_rows(contents.report)),
        (PICTURE, waterfall_picture(contents.report, table)),
        (TABLE, table),
        (ROWS, parity_rows(contents.report)),
    )


def _examples(contents: Contents) -> Section:
    return _section(
        "Golden images",
        "Images that did not calibrate, as the network sees them, with the answers of the float network and of the INT8 "
        "simulation. They are few: read the accuracy off the figures above.",
        (EXAMPLES, examples(contents)),
    )


def _blocks(contents: Contents) -> tuple[Section, ...]:
    table, sensitive = blocks_table(contents.report), sensitive_layers(contents.report)
    return (
        _section(
            "Blocks and branches",
            "The error is the squared difference to the float network's block, per sample. R2 is the share of it that a "
            "branch explains.",
            (PICTURE, blocks_picture(table)),
            (TABLE, table),
        ),
        _section(
            "The most sensitive layers",
            "The cost of INT8 at a layer is the SQNR that the output would gain were that layer alone in float, to first "
            "order, at the layers small enough to stay in FP16. It was measured before any of them did.",
            (PICTURE, sensitive_picture(sensitive)),
            (TABLE, sensitive),
        ),
    )


def _kernels(contents: Contents) -> Section:
    batch, lists = usual_batch(contents.manifest), contents.kernels
    if not lists.told:
        return _section("Kernels", "They do not tell what they read and write.", (TABLE, counts_table(lists)))
    missing = "" if lists.fp16 is not None else f" There is no FP16 twin to compare with: {clipped(lists.why_no_twin)}"
    return _section(
        "Kernels and memory",
        f"What the kernels of the engine read and write at batch {batch}, if no cache held anything, beside the same "
        f"network built in FP16. make explain estimates times from it.{missing}",
        (PICTURE, traffic_picture(lists, batch)),
        (TABLE, groups_table(lists, batch)),
        (TABLE, largest_table(lists, batch)),
    )


def _origin(contents: Contents) -> tuple[Section, ...]:
    made = command(contents.report)
    how = (
        "It was made with this command, at the commit and from the files named here."
        if made
        else "A package of this version does not record the command."
    )
    return (
        _section("How to make it again", how, (CODE, made), (ROWS, settings_rows(contents))),
        _section("What the stages said", "", (ROWS, notes(contents.report))),
        _section("Environment", "", (ROWS, environment_rows(contents))),
        _section(
            "Manifest", "Digests detect accidents, not an attacker: nothing is signed.", (TABLE, interface_table(contents)),
            (ROWS, identity_rows(contents)), (TABLE, files_table(contents)),
        ),
    )  # fmt: skip


def sections(contents: Contents) -> tuple[Section, ...]:
    """All sections that have anything to show. Raises UserError where a file of the package does not hold what they need."""
    report = contents.report
    found = (
        _accuracy(contents),
        _examples(contents),
        *_blocks(contents),
        _section(
            "Layers that stayed in FP16", "", (ROWS, float_rows(report)), (ROWS, attention_rows(report)),
        ),
        _section(
            "Calibration", "Ranges are chosen on the calibration images; these figures tell whether others fit in.",
            (ROWS, calibration_rows(report)), (TABLE, outside_table(report)),
        ),
        _section(
            "Speed",
            "Times on a shared machine drift; the ratio of neighbours in turn drifts less, and its interval tells how much.",
            (ROWS, speed_rows(report)),
        ),
        _section("Size", "", (PICTURE, sizes_picture(report))),
        _kernels(contents),
        *_origin(contents),
    )  # fmt: skip
    return tuple(section for section in found if section.blocks)
