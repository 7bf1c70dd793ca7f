"""kernels.json: the kernels of an engine and of its FP16 twin, recorded when they were built.

The twin is the float network, exported with FP16 types and built for the same target and batches. Recorded, both can be
compared later, on a machine without the backend, the network or torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calib.errors import UserError
from deploy.engine.kernels import Kernel, KernelTensor, megabytes_per_image
from deploy.package import KERNELS, read_json

LARGEST, AXES = 1 << 50, 16  # elements or multiply-adds, and axes: what has more is no kernel of ours


@dataclass(frozen=True)
class KernelLists:
    """The kernels of an engine, and those of its FP16 twin; `why_no_twin` says why there are none."""

    int8: tuple[Kernel, ...]
    fp16: tuple[Kernel, ...] | None
    why_no_twin: str = ""

    @property
    def told(self) -> bool:
        """Whether the kernels tell what they read and write; those of ONNX Runtime do not."""
        return any(kernel.reads for kernel in self.int8)

    def traffic(self, batch: int) -> dict[str, Any]:
        """How many kernels there are, and the MB that they move at most per image of a `batch`; in FP16 too.

        None where the kernels do not tell.
        """
        return {
            "batch": batch,
            "mb_per_image": megabytes_per_image(self.int8, batch) if self.told else None,
            "fp16_kernels": None if self.fp16 is None else len(self.fp16),
            "fp16_mb_per_image": None if self.fp16 is None else megabytes_per_image(self.fp16, batch),
        }


def _size(number: Any) -> bool:
    return type(number) is int and 0 <= number <= LARGEST


def _tensor(plain: Mapping[str, Any]) -> KernelTensor:
    tensor = KernelTensor(**{**plain, "dims": None if plain["dims"] is None else tuple(plain["dims"])})
    sizes = (*(tensor.dims or ()), tensor.elements) if len(tensor.dims or ()) <= AXES else (-1,)
    if not (isinstance(tensor.name, str) and isinstance(tensor.dtype, str) and all(map(_size, sizes))):
        raise TypeError(f"a tensor {str(plain)[:80]}")
    return tensor


def _kernel(plain: Mapping[str, Any]) -> Kernel:
    lists = {name: tuple(plain.get(name, ())) for name in ("inputs", "outputs", "layers", "int8_layers")}
    tensors = {name: tuple(_tensor(each) for each in plain[name]) for name in ("reads", "writes")}
    kernel = Kernel(**{**plain, **lists, **tensors})
    texts = (kernel.name, kernel.kind, *(text for texts in lists.values() for text in texts))
    if not all(isinstance(text, str) for text in texts) or not (kernel.macs is None or _size(kernel.macs)):
        raise TypeError(f"a kernel {str(plain)[:80]}")
    return kernel


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
    """The lists in the package at `folder`. Raises UserError if there is no package, or none with such a file."""
    path = folder / KERNELS
    if not path.exists():
        raise UserError(
            f"no {KERNELS} at '{folder}': expected the folder of a package; build one with make engine, or give the MODEL=, "
            f"MODULE=, WEIGHTS=, RECIPE= and OUT= that it was built with"
        )
    content = read_json(path)
    try:
        fp16 = content["fp16"]
        return KernelLists(
            tuple(_kernel(each) for each in content["int8"]),
            None if fp16 is None else tuple(_kernel(each) for each in fp16),
            str(content["why_no_twin"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"'{path}' is not a list of kernels ({error!r}): build the package again") from error
