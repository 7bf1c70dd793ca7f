"""report.html: the whole package on one page that needs nothing beside it."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.pages.contents import Contents
from deploy.pages.sections import sections
from deploy.pages.verdict import verdict

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATES = Path(__file__).parent / "templates"


def title(contents: Contents) -> str:
    """What the package is called."""
    return f"{contents.report.text('model')}, recipe {contents.report.text('recipe')}"


@functools.cache
def _template() -> "Template":
    import jinja2

    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template("report.html.jinja")


def html_page(contents: Contents) -> str:
    """The page as HTML; every text of the package is escaped. Raises UserError where a file does not hold what it needs."""
    return _template().render(
        title=title(contents),
        verdict=verdict(contents),
        warnings=contents.report.texts("warnings"),
        sections=sections(contents),
        id=contents.id,
    )
