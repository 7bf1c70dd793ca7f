"""The exception for bad input, what its message is made of, and what an unreadable file raises."""

import difflib
import re
import zipfile
import zlib
from collections.abc import Iterable

# What np.load and its archive raise for a damaged file. TypeError: a bare array in the place of an archive, which is no
# context manager.
UNREADABLE_ARRAYS = (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile, zlib.error)


# What torch says where two tensors have different types, and what is expected of a network instead.
OTHER_TYPE = r"should be the same|same dtype|expected scalar type|expected .* dtype"
ONE_TYPE = (
    "expected a network that computes in float32 throughout; take casts to half or double out of its forward pass"
)


class UserError(Exception):
    """Bad input. The message is one line that names the input, what was expected and what to do.

    The command line prints the message on stderr and exits with code 2; any other exception is a bug and keeps its
    traceback.
    """


class TooFewError(Exception):
    """The images at hand cannot show what they were asked for; the message tells how many there are and how many could."""


def first_line(error: BaseException, most: int | None = None) -> str:
    """Return the first line of the message of `error`, at most `most` characters of it; empty if it has none."""
    return (str(error).strip().splitlines() or [""])[0][:most]


def of_types(error: BaseException) -> bool:
    """Whether an error of torch tells of tensors of different types."""
    return re.search(OTHER_TYPE, str(error)) is not None


def several_types(kind: str, error: BaseException) -> UserError:
    """Return the refusal of a network of this class that fails because its tensors have different types."""
    return UserError(f"{kind} computes in several types ({first_line(error)}): {ONE_TYPE}")


def suggestion(name: str, known: Iterable[str]) -> str:
    """The sentence `" Did you mean 'vit_b'?"` with up to three names of `known` like `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    if not close:
        return ""
    return " Did you mean " + " or ".join(f"'{match}'" for match in close) + "?"
