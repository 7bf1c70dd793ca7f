"""The options that name a package by what it was built from, for the commands that read one."""

import argparse
from pathlib import Path

from calib.errors import UserError
from calib.store.digests import file_sha256
from calib.store.paths import expanded
from calib.weights.load import KEYWORDS
from deploy.package import MANIFEST, package_folder, read_json

DEFAULTS = {"model": "dinov2_s", "module": "", "weights": "auto", "recipe": "int8", "out": "artifacts"}


def add_package_options(parser: argparse.ArgumentParser) -> None:
    """Add --model, --module, --weights, --recipe and --out."""
    for option, default in DEFAULTS.items():
        parser.add_argument(f"--{option}", default=default, help=f"as for `engine` (default {default or 'none'})")


def add_package(parser: argparse.ArgumentParser) -> None:
    """Add the folder of a package, or these options in its place."""
    parser.add_argument("folder", nargs="?", help="of the package; default: that of these options")
    add_package_options(parser)


def folder_from_options(args: argparse.Namespace, given: str | None) -> Path:
    """The folder `given`, or without one that of the package that the options name. Raises UserError."""
    chosen = given or package_folder(args.out, args.model, args.module, args.weights, args.recipe)
    folder = expanded(str(chosen), "OUT")
    if not given and args.weights not in KEYWORDS:
        _require_checkpoint(folder, expanded(args.weights, "WEIGHTS"))
    return folder


def _require_checkpoint(folder: Path, checkpoint: Path) -> None:
    """Raise UserError unless the package in `folder` was built from the file `checkpoint`; a missing one is told later."""
    if not (folder / MANIFEST).exists():
        return
    built = read_json(folder / MANIFEST).get("weights")
    if not isinstance(built, dict) or not checkpoint.is_file() or built.get("file_sha256") != file_sha256(checkpoint):
        source = built.get("source") if isinstance(built, dict) else None
        raise UserError(
            f"WEIGHTS={checkpoint}: the package in '{folder}' was built from other weights ({source}): give the file it "
            f"was built from, leave WEIGHTS= out to take this package, or run make engine again"
        )
