"""Paths as users write them."""

from pathlib import Path

from calib.errors import UserError


def expanded(text: str, what: str) -> Path:
    """Return the path `text` with a leading ~ replaced. Raises UserError naming `what` if there is no such home."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{what}='{text}': {str(error).rstrip('.')}: write the path without ~") from error
