"""Writes page and card of a package beside its folder.

They lie beside it, not in it: a package holds what its manifest records and nothing else, so that `make verify` and a server
can trust every file of it. Both are views that can be made again from the package at any time, and name it by the sha256 of
its manifest; a package of an older version gets them too, and nothing that goes wrong here can cost an engine.
"""

import contextlib
import os
from pathlib import Path

from calib.errors import UserError
from deploy.pages.card import model_card
from deploy.pages.contents import read_contents
from deploy.pages.html import html_page

PAGE, CARD = "report.html", "MODEL_CARD.md"
MAX_BYTES = 500_000  # of the page


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"'{path}' cannot be written ({error.strerror}): copy the package elsewhere") from error


def write_pages(folder: Path) -> tuple[Path, Path]:
    """Write `<folder>.report.html` and `<folder>.MODEL_CARD.md`, and return both paths.

    Raises UserError if the package is missing or damaged, holds too much for one page, or its place cannot be written.
    """
    contents = read_contents(folder)
    page, card = html_page(contents), model_card(contents)
    if (size := len(page.encode())) > MAX_BYTES:
        raise UserError(
            f"'{folder}' gives a page of {size} bytes: expected {MAX_BYTES} at most; is it a package of this tool?"
        )
    whole = folder.resolve()  # "." has no name
    paths = tuple(whole.with_name(f"{whole.name}.{name}") for name in (PAGE, CARD))
    for path, text in zip(paths, (page, card), strict=True):
        _write(path, text)
    return paths[0], paths[1]
