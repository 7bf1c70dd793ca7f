"""The exception for bad input, and the suggestion of a similar name for its message."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message is one line that names the input, what was expected and what to do.

    The command line prints the message on stderr and exits with code 2; any other exception is a bug and keeps its
    traceback.
    """


def suggestion(name: str, known: Iterable[str]) -> str:
    """The sentence `" Did you mean 'vit_b'?"` with up to three names of `known` like `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    if not close:
        return ""
    return " Did you mean " + " or ".join(f"'{match}'" for match in close) + "?"
