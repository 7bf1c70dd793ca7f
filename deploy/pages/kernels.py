"""The kernels of an engine beside those of its FP16 twin."""

from collections.abc import Sequence

from deploy.engine.kernels import Kernel, megabytes_per_image
from deploy.explain.kernel_list import KernelLists
from deploy.explain.page import GROUPS, group_of
from deploy.package import KERNELS
from deploy.pages.parts import Line, Table, listed
from deploy.pages.values import Figure, clipped

LARGEST = 8  # names of kernels that are listed


def _megabytes(kernels: Sequence[Kernel], batch: int) -> Figure:
    megabytes = megabytes_per_image(kernels, batch)
    return Figure(f"{megabytes:.1f}", megabytes, KERNELS)


def _cells(kernels: Sequence[Kernel], batch: int) -> tuple[Line, Line]:
    """How many kernels there are and the MB that they move per image; nothing for none."""
    if not kernels:
        return ("",), ("",)
    return (Figure(f"{len(kernels)}", len(kernels), KERNELS),), (_megabytes(kernels, batch),)


def groups(lists: KernelLists) -> dict[str, list[Sequence[Kernel]]]:
    """The kernels of every group that has any: those in INT8, then those of the FP16 twin if it is known."""
    sides = [lists.int8, *([lists.fp16] if lists.fp16 is not None else [])]
    every = {group: [[kernel for kernel in side if group_of(kernel) == group] for side in sides] for group in GROUPS}
    return {group: list(found) for group, found in every.items() if any(found)}


def counts_table(lists: KernelLists) -> Table:
    """The number of kernels by group, and their sum, where they do not tell what they read and write."""
    every = {name: own for name, (own, *_) in groups(lists).items()} | {"all": lists.int8}
    rows = [((name,), (Figure(f"{len(own)}", len(own), KERNELS),)) for name, own in every.items()]
    return Table(("kernels of", "how many"), tuple(rows))


def groups_table(lists: KernelLists, batch: int) -> Table:
    """Kernels and MB per image of a `batch` by group, and their sums."""
    sides = ["this engine", *(["FP16 twin"] if lists.fp16 is not None else [])]
    head = ("kernels of", *(f"{side}: {what}" for side in sides for what in ("kernels", "MB per image")))
    every: list[tuple[str, list[Sequence[Kernel]]]] = [*groups(lists).items()]
    every.append(("all", [lists.int8, *([lists.fp16] if lists.fp16 is not None else [])]))
    rows = [((name,), *(cell for side in found for cell in _cells(side, batch))) for name, found in every]
    return Table(head, tuple(rows))


def largest_table(lists: KernelLists, batch: int) -> Table:
    """The kernels that move most; those of one name are counted together."""
    by_name: dict[str, list[Kernel]] = {}
    for kernel in lists.int8:
        by_name.setdefault(kernel.name, []).append(kernel)
    largest = sorted(by_name.items(), key=lambda item: -megabytes_per_image(item[1], batch))[:LARGEST]
    rows = []
    for name, kernels in largest:
        layers = [clipped(layer) for kernel in kernels for layer in kernel.layers]
        rows.append(((clipped(name),), *_cells(kernels, batch), (listed(layers, 3),)))
    return Table(("kernel", "how many", "MB per image", "what they compute"), tuple(rows))
