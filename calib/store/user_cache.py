"""Where the tool keeps what it can make again, and how much of it."""

import contextlib
import os
import shutil
from pathlib import Path

from calib.errors import UserError


def cache_root() -> Path:
    """Folder of all that the tool keeps in the user's cache; it need not exist yet.

    Raises UserError if the user has no home folder and XDG_CACHE_HOME is not set.
    """
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(root).expanduser() / "int8-engine"
    except RuntimeError as error:
        raise UserError(
            "this user has no home folder to keep downloads and states in: set XDG_CACHE_HOME to a folder"
        ) from error


def cache_folder(content: str) -> Path:
    """Folder for files of one kind in the user's cache; it need not exist yet. Raises UserError as `cache_root`."""
    return cache_root() / content


def _files(folder: Path) -> list[tuple[float, int, Path]]:
    """(time of the last change, bytes, path) of the files in `folder`, the oldest first."""
    found = []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # another process may have removed it meanwhile
            if path.is_file() and not path.is_symlink():
                stat = path.stat()
                found.append((stat.st_mtime, stat.st_size, path))
    return sorted(found)


def trim(folder: Path, most: int) -> None:
    """Remove the files of `folder` that changed longest ago until the others have at most `most` bytes together."""
    files = _files(folder)
    excess = sum(size for _, size, _ in files) - most
    for _, size, path in files:
        if excess <= 0:
            return
        with contextlib.suppress(OSError):
            path.unlink()
        excess -= size


def clear() -> tuple[Path, int]:
    """Remove all that the tool keeps; returns (its folder, how many bytes its files had). Raises UserError if it cannot."""
    root = cache_root()
    size = sum(size for _, size, _ in _files(root))
    try:
        shutil.rmtree(root)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"'{error.filename}' cannot be removed ({error.strerror}): remove '{root}' yourself") from error
    return root, size
