"""What `python -m deploy explain` prints: work by kind of kernel, estimates for a few GPUs, causes."""

import os
import re
from collections.abc import Sequence
from typing import TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from deploy.engine.architectures import runs_on
from deploy.engine.kernels import Kernel, megabytes_per_image, only_moves
from deploy.explain.causes import causes
from deploy.explain.compared import Compared
from deploy.explain.gpus import GPUS, GpuPeaks
from deploy.explain.kernel_list import KernelLists
from deploy.explain.roofline import ASSUMPTIONS, BATCHES, limit, seconds

GROUPS = (
    "INT8 GEMM", "FP16 GEMM", "FP32 GEMM", "GEMM of unknown type",
    "INT8 convolution", "FP16 convolution", "FP32 convolution", "convolution of unknown type",
    "INT8 attention", "FP16 attention", "FP32 attention", "attention of unknown type",
    "casts, copies", "norms, activations, sums",
)  # fmt: skip
_KINDS = {"gemm": "GEMM", "conv": "convolution", "attention": "attention"}
_WIDTH = 118  # characters, where there is no terminal to ask


def group_of(kernel: Kernel) -> str:
    """The group of `kernel`, one of GROUPS."""
    if kind := _KINDS.get(kernel.kind):
        return f"{kind} of unknown type" if kernel.precision == "unknown" else f"{kernel.precision.upper()} {kind}"
    return GROUPS[-2] if only_moves(kernel) else GROUPS[-1]


def _figures(kernels: Sequence[Kernel], gpu: GpuPeaks, batch: int) -> tuple[str, ...]:
    """How many `kernels`, MB and multiply-adds per image, the estimated time of the batch and what limits most of them."""
    if not kernels:
        return ("", "", "", "", "")
    macs = sum(kernel.macs or 0 for kernel in kernels) / 1e9
    limits = [limit(kernel, gpu, batch) for kernel in kernels]
    return (
        str(len(kernels)),
        f"{megabytes_per_image(kernels, batch):.1f}",
        f"{macs:.2f}" if macs else "",
        f"{seconds(kernels, gpu, batch) * 1e6:.0f}",
        max(dict.fromkeys(limits), key=limits.count),
    )


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _work(lists: KernelLists, gpu: GpuPeaks, batch: int) -> Table:
    sides = [("INT8", lists.int8), *([("FP16", lists.fp16)] if lists.fp16 is not None else [])]
    columns = [f"{side}\n{column}" for side, _ in sides for column in ("kernels", "MB", "GMAC", "us", "limit")]
    table = _table(
        f"MB and GMAC per image; us and what limits most kernels estimated for {gpu.name} at batch {batch}", columns
    )
    for group in GROUPS:
        rows = [[kernel for kernel in kernels if group_of(kernel) == group] for _, kernels in sides]
        if any(rows):
            table.add_row(group, *(cell for kernels in rows for cell in _figures(kernels, gpu, batch)))
    table.add_section()
    table.add_row("all", *(cell for _, kernels in sides for cell in _figures(kernels, gpu, batch)))
    return table


def _ratios(lists: KernelLists) -> Table:
    table = _table(
        "estimated speed of INT8 beside FP16, slower below 1: without a cache - with all activations cached",
        [f"batch {batch}" for batch in BATCHES],
    )
    for gpu in GPUS.values():
        at = Compared(lists.int8, lists.fp16, gpu, BATCHES[0])
        table.add_row(gpu.name, *(f"{at.ratio(batch):.2f} - {at.ratio(batch, True):.2f}" for batch in BATCHES))
    return table


def _unread(kernels: Sequence[Kernel]) -> str | None:
    """What the sums leave out because it cannot be read, or None."""
    tensors = sum(tensor.dims is None for kernel in kernels for tensor in (*kernel.reads, *kernel.writes))
    products = sum(kernel.kind in _KINDS and kernel.macs is None for kernel in kernels)
    if not tensors and not products:
        return None
    return (
        f"left out, as the engine does not tell them: the sizes of {tensors} tensors, the work of {products} products"
    )


def _not_for(targets: Sequence[str]) -> str | None:
    """What to know of the GPUs in the table that an engine for `targets` does not run on, or None."""
    architectures = [each for each in targets if re.fullmatch(r"SM\d+\+?", each)]
    others = [gpu.name for gpu in GPUS.values() if not any(runs_on(each, gpu.sm) for each in architectures)]
    if not architectures or not others:
        return None
    return f"this engine is for {', '.join(architectures)} and does not run on {', '.join(others)}: theirs is another build"


def print_page(
    title: str,
    lists: KernelLists,
    gpu: GpuPeaks,
    batch: int,
    targets: Sequence[str] = (),
    stream: TextIO | None = None,
) -> None:
    """Print where the time of an engine for `targets` goes, on `stream` (stdout by default)."""
    terminal = stream is None and os.isatty(1)
    console = Console(file=stream, highlight=False, width=None if terminal else _WIDTH)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    say(title)
    console.print(_work(lists, gpu, batch))
    if lists.fp16 is not None:
        console.print(_ratios(lists))
    else:
        say(f"no FP16 engine to compare with: {lists.why_no_twin}")
    if not_for := _not_for(targets):
        say(not_for)
    say("estimates, no measurement, assuming that")
    for assumption in ASSUMPTIONS:
        say(f"  {assumption}")
    if left_out := _unread((*lists.int8, *(lists.fp16 or ()))):
        say(left_out)
    found = causes(Compared(lists.int8, lists.fp16, gpu, batch))
    say(
        f"why INT8 may not be faster on {gpu.name} at batch {batch}:" if found else "nothing found that slows INT8 down"
    )
    for name, lines in found.items():
        say(f"  {name}")
        for line in lines:
            say(f"    {line}")
