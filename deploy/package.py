"""The folder an engine ships in: written beside its final place, then renamed, so that it is whole or absent."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from calib.errors import UserError

MODEL, MODEL_FP32, ENGINE = "model.onnx", "model.fp32.onnx", "model.engine"
MANIFEST, REPORT, GOLDEN = "manifest.json", "report.json", "golden.npz"
FILES = (MODEL, MODEL_FP32, ENGINE, MANIFEST, REPORT, GOLDEN)

UNWRITABLE = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.EFBIG, errno.ENOTDIR}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _leftovers(final: Path, kind: str) -> list[Path]:
    """Folders of runs that were killed: `.int8.tmp-1234` whose process 1234 is gone."""
    found = final.parent.glob(f".{final.name}.{kind}-*")
    return [path for path in found if path.suffix and not _alive(int(path.name.rpartition("-")[2]))]


def _recover(final: Path) -> None:
    """Undo what a killed run left: drop half-written folders, put a displaced package back."""
    for old in _leftovers(final, "old"):
        if final.exists():
            shutil.rmtree(old)
        else:
            old.rename(final)
    for half in _leftovers(final, "tmp"):
        shutil.rmtree(half)


@contextmanager
def staging(final: Path) -> Iterator[Path]:
    """A folder to write into that becomes `final` when the block ends well and vanishes when it does not.

    A package already at `final` stays until the new one is complete. Raises UserError if the place cannot be written.
    """
    temporary = final.parent / f".{final.name}.tmp-{os.getpid()}"
    old = final.parent / f".{final.name}.old-{os.getpid()}"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _recover(final)
        temporary.mkdir()
    except OSError as error:
        raise UserError(
            f"output folder '{final}' cannot be written ({error.strerror}): choose another with OUT="
        ) from error
    try:
        yield temporary
        if final.exists():
            final.rename(old)
        temporary.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if error.errno in UNWRITABLE:
            raise UserError(
                f"output folder '{final}' cannot be written ({error.strerror}): free space or choose another with OUT="
            ) from error
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(temporary)


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as indented JSON; refuses NaN and Inf, which other readers reject."""
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError if the file is missing or not JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"'{path}' is not a readable JSON file ({error}): build the package again") from error
