"""TOML files that users name by their stem in a folder of ours, or by a path of their own."""

import tomllib
from pathlib import Path
from typing import Any

from calib.errors import UserError, suggestion


def stems(folder: Path) -> tuple[str, ...]:
    """The names of the files in `folder`."""
    return tuple(sorted(path.stem for path in folder.glob("*.toml")))


def named_path(name: str, folder: Path, option: str) -> Path:
    """Where `name` is. Raises UserError, calling it the user's `option`, with the nearest names."""
    if name.endswith(".toml"):
        return Path(name)
    known = stems(folder)
    if name not in known:
        raise UserError(
            f"unknown {option} '{name}': expected {', '.join(known)} or a .toml file.{suggestion(name, known)}"
        )
    return folder / f"{name}.toml"


def read_toml(path: Path, where: str) -> dict[str, Any]:
    """The content of `path`. Raises UserError, beginning with `where`, if there is none or a syntax error in it."""
    try:
        return tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{where} cannot be read: {error}") from error
