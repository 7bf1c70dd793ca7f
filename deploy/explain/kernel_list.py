"""kernels.json: the kernels of an engine and of its FP16 twin, recorded when they were built.

The twin is the float network, exported with FP16 types and built for the same target and batches. Recorded, both can be
compared later, on a machine without the backend, the network or torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calib.errors import UserError
from deploy.engine.kernels import Kernel, Tensor, megabytes_per_image
from deploy.package import KERNELS, read_json


@dataclass(frozen=True)
class KernelLists:
    """The kernels of an engine, and those of its FP16 twin; `why_no_twin` says why there are none."""

    int8: tuple[Kernel, ...]
    fp16: tuple[Kernel, ...] | None
    why_no_twin: str = ""

    def traffic(self, batch: int) -> dict[str, Any]:
        """How many kernels there are, and the MB that they move at most per image of a `batch`; in FP16 too.

        None where kernels do not tell what they read and write, as those of ONNX Runtime.
        """
        told = any(kernel.reads for kernel in self.int8)
        return {
            "batch": batch,
            "mb_per_image": megabytes_per_image(self.int8, batch) if told else None,
            "fp16_kernels": None if self.fp16 is None else len(self.fp16),
            "fp16_mb_per_image": None if self.fp16 is None else megabytes_per_image(self.fp16, batch),
        }


def _kernel(plain: Mapping[str, Any]) -> Kernel:
    def tensors(name: str) -> tuple[Tensor, ...]:
        return tuple(
            Tensor(**{**each, "dims": None if each["dims"] is None else tuple(each["dims"])}) for each in plain[name]
        )

    lists = {name: tuple(plain[name]) for name in ("inputs", "outputs", "layers")}
    return Kernel(**{**plain, **lists, "reads": tensors("reads"), "writes": tensors("writes")})


def lists_to_json(lists: KernelLists) -> dict[str, Any]:
    """The lists as plain values."""

    def plain(kernels: Sequence[Kernel]) -> list[dict[str, Any]]:
        return [asdict(kernel) for kernel in kernels]

    return {
        "int8": plain(lists.int8),
        "fp16": None if lists.fp16 is None else plain(lists.fp16),
        "why_no_twin": lists.why_no_twin,
    }


def read_lists(folder: Path) -> KernelLists:
    """The lists in the package at `folder`.

    Raises UserError if there is no package, none with such a file, or if its kernels do not tell what they read and write.
    """
    path = folder / KERNELS
    if not path.exists():
        raise UserError(
            f"no {KERNELS} at '{folder}': expected the folder of a package; build one with make engine, or give the MODEL=, "
            f"MODULE=, WEIGHTS=, RECIPE= and OUT= that it was built with"
        )
    content = read_json(path)
    try:
        fp16 = content["fp16"]
        found = KernelLists(
            tuple(_kernel(each) for each in content["int8"]),
            None if fp16 is None else tuple(_kernel(each) for each in fp16),
            content["why_no_twin"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"'{path}' is not a list of kernels ({error!r}): build the package again") from error
    if not any(kernel.reads for kernel in found.int8):
        raise UserError(
            f"the kernels of the engine in '{folder}' do not tell what they read and write: expected an engine of "
            f"TARGET=tensorrt or tensorrt_rtx; one of onnxruntime runs on a CPU and is measured by make engine"
        )
    return found
