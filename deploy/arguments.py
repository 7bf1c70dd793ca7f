"""Kinds of arguments that several verbs of the command line take."""

import argparse
import re

from calib.errors import UserError


def architectures(text: str) -> tuple[int, ...]:
    """GPU architectures such as "86,89,120" or "sm89". Raises UserError for anything else."""
    try:
        return tuple(dict.fromkeys(int(part.strip().lower().removeprefix("sm")) for part in text.split(",")))
    except ValueError:
        raise UserError(f"SM='{text}': expected GPU architectures such as 86,89,120") from None


def count(text: str) -> int:
    """A whole number of 1 or more."""
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}': expected a whole number of 1 or more")
    return int(text)
