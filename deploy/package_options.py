"""The options that name a package by what it was built from, for the commands that read one."""

import argparse
from pathlib import Path

from calib.store.paths import expanded
from deploy.package import package_folder

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
    return expanded(str(chosen), "OUT")
