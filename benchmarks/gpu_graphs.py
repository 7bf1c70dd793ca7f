"""The graphs that `benchmarks.gpu_latency` makes engines of: of packages and their float network, or those of a folder."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import onnx

from benchmarks.float_twin import float_twin
from benchmarks.fp8_twin import fp8_twin
from calib.errors import UserError
from deploy.bridge.export import export_float, export_fp16
from deploy.package import MANIFEST, MODEL, package_folder, read_json

FP16, FP32 = "fp16", "fp32"  # FP16: what the others are compared with


@dataclass(frozen=True)
class Subject:
    """A graph that an engine is made of.

    `golden`: the package whose golden images it is compared with, None for none. `optional`: whether others are timed
    without it where it cannot be built.
    """

    graph: onnx.ModelProto
    golden: Path | None = None
    optional: bool = False


def graphs_of(options: argparse.Namespace) -> dict[str, Subject]:
    """Return the float network in FP16 first, then the graphs that `options` ask for.

    Raises UserError for a package that is missing, or was made of other weights.
    """
    model, out, weights = options.model, options.out, options.weights
    folders = {recipe: package_folder(out, model, None, weights, recipe) for recipe in options.recipes}
    sizes = set()
    for recipe, folder in folders.items():
        if not (folder / MANIFEST).exists():
            given = "" if weights == "auto" else f" WEIGHTS={weights}"
            beside = package_folder(out, model, None, "random", recipe)
            of_random = "; there is one of random weights, for --weights random" if (beside / MANIFEST).exists() else ""
            raise UserError(
                f"no package at '{folder}': run make engine MODEL={model}{given} RECIPE={recipe} first{of_random}"
            )
        preprocessing = read_json(folder / MANIFEST)["preprocessing"]
        if preprocessing is None:
            raise UserError(f"'{folder}' takes named inputs: expected a package of a network of images")
        sizes.add((preprocessing["height"], preprocessing["width"]))
    if len(sizes) != 1:
        raise UserError(f"the packages take images of different sizes ({sizes}): expected one; build them again")
    first = folders[options.recipes[0]]
    twin = float_twin(first, weights)
    subjects = {FP16: Subject(export_fp16(*twin), first)}
    if options.fp32:
        subjects[FP32] = Subject(export_float(*twin), first)
    subjects |= {name: Subject(onnx.load(folder / MODEL), folder) for name, folder in folders.items()}
    if options.fp8:
        # no golden images: integers that were rounded again to FP8 say nothing of a network that is calibrated for it
        subjects |= {f"{name}, FP8": Subject(fp8_twin(subjects[name].graph), optional=True) for name in options.recipes}
    return subjects


def graphs_in(folder: Path) -> dict[str, Subject]:
    """Return the graphs (*.onnx) in `folder` by name, that in FP16 first.

    Raises UserError if that, or any other, is missing.
    """
    paths = {path.stem: path for path in sorted(folder.glob("*.onnx"))}
    if FP16 not in paths or len(paths) < 2:
        raise UserError(
            f"'{folder}' holds {', '.join(paths) or 'no graphs'}: expected {FP16}.onnx and others to compare"
        )
    return {name: Subject(onnx.load(paths[name])) for name in (FP16, *(each for each in paths if each != FP16))}
