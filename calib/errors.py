"""The one exception a user is meant to read."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: one line naming the thing, what was expected and what to do.

    The command line prints it on stderr and exits with code 2; any other exception is a bug and keeps its
    traceback.
    """


def suggestion(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'vit_b'?"` with up to three close names, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    if not close:
        return ""
    return " Did you mean " + " or ".join(f"'{match}'" for match in close) + "?"
