"""What a page is made from: a package whose files are those that its manifest records."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calib.errors import UserError
from calib.store.digests import file_sha256
from deploy.explain.kernel_list import KernelLists, read_lists
from deploy.measure.onnx_runner import Given
from deploy.measure.outputs import Outputs
from deploy.package import GOLDEN, MANIFEST, REPORT
from deploy.pages.values import Values
from deploy.verify import file_faults, golden_arrays


@dataclass(frozen=True)
class Contents:
    """A package as it was read.

    `id`: sha256 (hex) of its manifest, which itself holds that of every other file. `images` (N, 3, H, W): the golden
    images, or arrays (N, ...) by name, with the outputs (N, ...) by name of the float network and of the simulation.
    """

    folder: Path
    id: str
    report: Values
    manifest: Values
    kernels: KernelLists
    images: Given
    exact: Outputs
    simulated: Outputs


def read_contents(folder: Path) -> Contents:
    """Read the package at `folder`. Raises UserError if a file of it is missing, has changed or cannot be read."""
    if wrong := file_faults(folder):
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UserError(f"'{folder}' is not as it was built: {wrong[0]}{more}; build the package again")
    images, exact, simulated = golden_arrays(folder / GOLDEN)
    given = [images] if isinstance(images, np.ndarray) else [*images.values()]
    if not all(np.isfinite(array).all() for array in (*given, *exact.values(), *simulated.values())):
        raise UserError(f"'{folder / GOLDEN}' holds NaN or Inf: build the package again")
    report, manifest = Values.of(folder / REPORT), Values.of(folder / MANIFEST)
    return Contents(
        folder, file_sha256(folder / MANIFEST), report, manifest, read_lists(folder), images, exact, simulated
    )
