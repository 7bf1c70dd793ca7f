"""What goes on beside the work of libraries: what they write, kept from the terminal, and the collection of garbage."""

import gc
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


@contextmanager
def no_collection() -> Iterator[None]:
    """Look for no garbage inside: a trace makes many objects that stay, and every search would walk all of them."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()
