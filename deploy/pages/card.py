"""MODEL_CARD.md: a card as the Hugging Face hub reads it, YAML at the top and Markdown below."""

import functools
import re
from typing import TYPE_CHECKING, Any

from calib.errors import UserError
from deploy.engine.backends import ONNXRUNTIME
from deploy.pages.contents import Contents
from deploy.pages.html import TEMPLATES, title
from deploy.pages.measured import calibration_rows, fidelity_rows, parity_rows, speed_rows
from deploy.pages.origin import command, files_table, identity_rows, interface_table
from deploy.pages.parts import Row
from deploy.pages.verdict import verdict

if TYPE_CHECKING:
    from jinja2 import Template

_MARKS = re.compile(r"([\\`*_\[\]<>#|&~!$])")
# our task -> the hub's pipeline tag; other tasks have none
TAGS = {"classifier": "image-classification", "features": "image-feature-extraction"}
# key of the fidelity -> name of the metric
METRICS = {
    "sqnr_db": "SQNR to the float network, dB",
    "cosine": "cosine similarity to the float network",
    "top1_agreement": "top-1 agreement with the float network",
    "top1": "top-1 accuracy",
}


def markdown(text: Any) -> str:
    """`text` on one line, with what Markdown or HTML would read as a mark escaped."""
    return _MARKS.sub(r"\\\1", re.sub(r"\s+", " ", str(text)))


def _metadata(contents: Contents) -> str:
    """The YAML of the card, without its fences."""
    from huggingface_hub import EvalResult, ModelCardData

    fidelity, images = contents.report.part("fidelity"), contents.report.part("evaluation")
    task = TAGS.get(contents.manifest.text("task"))
    results = [
        EvalResult(
            task_type=task or "other", dataset_type="images", dataset_name=images.text("source"), metric_type=key,
            metric_value=fidelity.number(key), metric_name=name,
        )
        for key, name in METRICS.items()
        if fidelity.holds(key)
    ]  # fmt: skip
    backend = contents.report.part("engine").text("backend")
    return ModelCardData(
        model_name=title(contents),
        tags=["int8", "quantized", ONNXRUNTIME if backend == ONNXRUNTIME else "tensorrt", "onnx", "vision"],
        pipeline_tag=task,
        eval_results=results,
    ).to_yaml()


def _tables(contents: Contents) -> tuple[tuple[str, str, tuple[Row, ...]], ...]:
    """(heading, sentence, rows) of every table of two columns."""
    report = contents.report
    return (
        ("What it is", "", verdict(contents).points),
        (
            "Accuracy",
            "Measured on images that nothing was fitted on. SQNR is the signal-to-quantization-noise ratio at the output.",
            (*fidelity_rows(report), *parity_rows(report)),
        ),
        ("Images", "", calibration_rows(report)),
        ("Speed", "", speed_rows(report)),
        ("Digests", "All are sha256.", identity_rows(contents)),
    )


def _fenced(code: str | None) -> str | None:
    """Code for a fenced block, which it cannot close: a fence would stand at the start of a line, and this is one line."""
    if code is not None and code.startswith(("`", "~")):
        raise UserError(f"the recorded command begins with '{code[0]}': expected a command; build the package again")
    return code


def _finalized(value: Any) -> Any:
    """`value` as it goes into the card: escaped, unless it is marked as already fit for it."""
    from markupsafe import Markup

    return value if isinstance(value, Markup) else markdown(value)


@functools.cache
def _template() -> "Template":
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), finalize=_finalized, undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template("model_card.md.jinja")


def model_card(contents: Contents) -> str:
    """The card as text. Raises UserError where a file of the package does not hold what it needs."""
    from markupsafe import Markup

    made = _fenced(command(contents.report))
    return _template().render(
        metadata=Markup(_metadata(contents)),  # YAML, which the library has escaped
        title=title(contents),
        verdict=verdict(contents),
        warnings=contents.report.texts("warnings"),
        tables=_tables(contents),
        interface=interface_table(contents),
        files=files_table(contents),
        command=None if made is None else Markup(made),  # inside a fence
    )
