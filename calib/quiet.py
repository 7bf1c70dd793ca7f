"""What libraries write beside the errors that they raise, kept from the terminal."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr


@contextmanager
def quiet(logger: str) -> Iterator[None]:
    """Suppress stderr, and what `logger` logs below errors; exceptions still arrive."""
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(before)
