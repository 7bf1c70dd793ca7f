"""TOML files that the user names by their stem, if they come with the tool, or by a path."""

import tomllib
from pathlib import Path
from typing import Any

from calib.errors import UserError, suggestion


def stems(folder: Path) -> tuple[str, ...]:
    """The stems of all TOML files in `folder`, sorted."""
    return tuple(sorted(path.stem for path in folder.glob("*.toml")))


def named_path(name: str, folder: Path, option: str) -> Path:
    """The path of the TOML file `name`, the value of the user's `option`: a path, or a stem in `folder`.

    Raises UserError with similar names if there is no such stem.
    """
    if name.endswith(".toml"):
        return Path(name)
    known = stems(folder)
    if name not in known:
        raise UserError(
            f"unknown {option} '{name}': expected {', '.join(known)} or a .toml file.{suggestion(name, known)}"
        )
    return folder / f"{name}.toml"


def read_toml(path: Path, where: str) -> dict[str, Any]:
    """The content of the TOML file `path`.

    Raises UserError, which begins with `where`, if the file cannot be read or has a syntax error.
    """
    if not path.is_file():
        raise UserError(f"{where}: no such file; give the path of a .toml file, or a name without .toml")
    try:
        return tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{where} cannot be read: {error}") from error
