"""Where the tool keeps what it can make again."""

import os
from pathlib import Path

from calib.errors import UserError


def cache_folder(content: str) -> Path:
    """Folder for files of one kind in the user's cache; it need not exist yet.

    Raises UserError if the user has no home folder and XDG_CACHE_HOME is not set.
    """
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(root).expanduser() / "int8-engine" / content
    except RuntimeError as error:
        raise UserError(
            "this user has no home folder to keep downloads and states in: set XDG_CACHE_HOME to a folder"
        ) from error
