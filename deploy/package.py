"""The package: the folder an engine ships in.

It is written beside its final place and renamed when it is complete, so a package is whole or absent.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from calib.errors import UserError
from calib.weights.own import name_of
from deploy.lock import HeldError, locked

MODEL, MODEL_FP32, ENGINE = "model.onnx", "model.fp32.onnx", "model.engine"
WEIGHTS = ".weights"  # behind the name of a graph: the file of weights that are too large for it
MANIFEST, REPORT, GOLDEN, KERNELS = "manifest.json", "report.json", "golden.npz", "kernels.json"
LAYERS = "engine_layers.json"  # what the engine tells of its kernels, in its own words
GOLDEN_ONLY = "images"  # the name of the only input in golden.npz
GOLDEN_INPUT = "input_"  # ... and what the names of several begin with
GOLDEN_FLOAT, GOLDEN_SIMULATED = "float_", "simulated_"  # ... and those of outputs
RANDOM = "-random-weights"  # what the name of a package of random weights ends with
FILES = (MODEL, MODEL_FP32, ENGINE, LAYERS, MANIFEST, REPORT, GOLDEN, KERNELS)

UNWRITABLE = {
    errno.ENOSPC,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EDQUOT,
    errno.EFBIG,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
}


def package_folder(out: str, model: str, module: str | None, weights: str, recipe: str) -> Path:
    """Where `make engine` writes the package of these options, and `make verify` finds it.

    Raises UserError if `module` is of another form than module:factory.
    """
    name = name_of(module) if module else model
    random = RANDOM if weights == "random" else ""
    return Path(out) / (name.replace("/", "_") + random) / recipe_name(recipe)


def not_accepted(final: Path) -> Path:
    """Where a package goes that does not keep its limits (deploy/acceptance.py): beside `final`, which stays as it was."""
    return final.with_name(f"{final.name}.not-accepted")


def layers_beside(final: Path) -> Path:
    """Where `LAYERS` of an engine goes that fails its audit: beside the package's folder, which is not made then."""
    return final.with_name(f"{final.name}.{LAYERS}")


def recipe_name(recipe: str) -> str:
    """Return the name of a recipe, or of that in a .toml file."""
    return Path(recipe).stem if recipe.endswith(".toml") else recipe


def engine_targets(folder: Path) -> tuple[str, ...]:
    """Return what the engine of the package in `folder` was built for, such as SM89; empty where that is not told."""
    try:
        engine = read_json(folder / MANIFEST).get("engine")
    except UserError:
        return ()
    targets = engine.get("targets") if isinstance(engine, dict) else None
    return tuple(each for each in targets if isinstance(each, str)) if isinstance(targets, list) else ()


def _leftovers(final: Path, kind: str) -> list[Path]:
    """Folders that killed runs left behind, as `.int8.tmp-1234`; who holds the lock knows that no run is writing them."""
    return [path for path in final.parent.glob(f".{final.name}.{kind}-*") if path.name.rpartition("-")[2].isdigit()]


def _recover(final: Path) -> None:
    """Clean up after a killed run: remove half-written folders, put a displaced package back."""
    for old in _leftovers(final, "old"):
        if final.exists():
            shutil.rmtree(old)
        else:
            old.rename(final)
    for half in _leftovers(final, "tmp"):
        shutil.rmtree(half)


def recover(folder: Path) -> None:
    """Put the package at `folder` back where a killed run had displaced it. Raises UserError while a run is writing it."""
    if not (folder.parent.is_dir() and _leftovers(folder, "old")):
        return
    try:
        with locked(folder.parent / f".{folder.name}.lock"):
            _recover(folder)
    except HeldError:
        raise UserError(f"another run is writing '{folder}': wait until it has ended") from None
    except OSError as error:
        raise UserError(f"'{folder}' cannot be put back after a run that was killed ({error.strerror})") from error


def _require_replaceable(final: Path) -> None:
    """Raise UserError if something other than a package of ours lies at `final`: only a package may be replaced."""
    if not final.exists() and not final.is_symlink():
        return
    with contextlib.suppress(OSError, UserError):
        if not final.is_symlink() and isinstance(read_json(final / MANIFEST).get("files"), dict):
            return
    raise UserError(
        f"output folder '{final}' is not a package (no {MANIFEST} of ours in it) and is not replaced: move it away or "
        f"choose another with OUT="
    )


@contextmanager
def staging(final: Path, become: Callable[[], Path] | None = None) -> Iterator[Path]:
    """Yield a folder to write into. It becomes `final` when the block ends well and is removed when it does not.

    `become` may name another place then, which no other run writes that does not write `final`. A package already there
    stays until the new one is complete. Raises UserError if the place cannot be written, if
    what lies there is not a package, or while another run is writing it.
    """
    made = not final.parent.exists()
    with contextlib.ExitStack() as held:
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            if made:
                held.callback(_remove_if_empty, final.parent)
            held.enter_context(locked(final.parent / f".{final.name}.lock"))
        except HeldError:
            raise UserError(
                f"another run is writing '{final}': wait until it has ended, or choose another folder with OUT="
            ) from None
        except OSError as error:
            raise _unwritable(final, error) from error
        with _written(final, become or (lambda: final)) as temporary:
            yield temporary


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _unwritable(final: Path, error: OSError) -> UserError:
    return UserError(f"output folder '{final}' cannot be written ({error.strerror}): choose another with OUT=")


@contextmanager
def _written(final: Path, become: Callable[[], Path]) -> Iterator[Path]:
    """What `staging` does while it holds the lock."""
    temporary = final.parent / f".{final.name}.tmp-{os.getpid()}"
    try:
        _recover(final)
        _require_replaceable(final)
        temporary.mkdir()
    except OSError as error:
        raise _unwritable(final, error) from error
    try:
        yield temporary
        place = become()
        if place != final:
            _recover(place)
        _require_replaceable(place)
        old = place.parent / f".{place.name}.old-{os.getpid()}"
        if place.exists():
            place.rename(old)
        temporary.rename(place)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        ours = error.filename is None or Path(error.filename).resolve().is_relative_to(final.parent.resolve())
        if error.errno in UNWRITABLE and not ours:
            raise UserError(
                f"'{error.filename}' cannot be read ({error.strerror}): expected a path that this user may read"
            ) from error
        if error.errno in UNWRITABLE:
            raise UserError(
                f"output folder '{final}' cannot be written ({error.strerror}): free space or choose another with OUT="
            ) from error
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(temporary)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as indented JSON. Raises ValueError for NaN and Inf, which other readers reject."""
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError if the file is missing, not JSON, or holds something else than an object."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is not a readable JSON file ({error}): build the package again") from error
    if not isinstance(content, dict):
        raise UserError(f"'{path}' holds a {type(content).__name__}, expected an object: build the package again")
    return content


def stored_bytes(graph: Path) -> int:
    """The size of a graph in files: its own, and where it is larger than protobuf holds that of its weights beside it."""
    return sum(each.stat().st_size for each in (graph, graph.with_name(graph.name + WEIGHTS)) if each.exists())
