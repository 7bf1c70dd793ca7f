"""Where the tool keeps what it can make again."""

import os
from pathlib import Path


def cache_folder(content: str) -> Path:
    """Folder for files of one kind in the user's cache; it need not exist yet."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "int8-engine" / content
