"""What makes torch.onnx.export quicker and lets go of the weights of its networks; its graphs are byte for byte the same."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import onnx_ir as ir
from torch import Tensor
from torch.nn import functional as F

from calib.quiet import no_collection

try:
    from torch.onnx._internal._lazy_import import onnxscript_apis
except ImportError:  # torch's own name: in a version without it exports take longer and keep their weights
    onnxscript_apis = None  # type: ignore[assignment]

OPERATORS, OPTIMIZE = "get_torchlib_ops", "optimize"  # the functions of it that every export calls


@functools.cache
def _read_once(read: Callable[[], Any]) -> Any:
    return read()


def _noting(optimize: Callable[..., ir.Model], weights: list[ir.Value]) -> Callable[..., ir.Model]:
    """`optimize` that adds the weights of the graph it is given to `weights`."""

    def noted(model: ir.Model, *args: Any, **named: Any) -> ir.Model:
        weights.extend(model.graph.initializers.values())
        return optimize(model, *args, **named)

    return noted


def _hardtanh(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`F.hardtanh` that writes into its input by a copy, which the exporter leaves out.

    Otherwise the exporter decomposes every ReLU6 in place in Python, which is half the time of exporting a MobileNet.
    """

    def traced(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
        found = plain(input, min_val, max_val)
        return input.copy_(found) if inplace else found

    return traced


@contextmanager
def quick_export() -> Iterator[list[ir.Value]]:
    """Give the weights of the graphs that are exported inside, as they were before they were optimized.

    Inside, torch's table of operators is read once per process (each reading parses 500 functions), ReLU6 in place is one
    operator, and no garbage is looked for.
    """
    weights: list[ir.Value] = []
    with ExitStack() as patches:
        patches.enter_context(no_collection())
        patches.enter_context(patch.object(F, "hardtanh", _hardtanh(F.hardtanh)))
        if read := getattr(onnxscript_apis, OPERATORS, None):
            patches.enter_context(patch.object(onnxscript_apis, OPERATORS, lambda: _read_once(read)))
        if optimize := getattr(onnxscript_apis, OPTIMIZE, None):
            patches.enter_context(patch.object(onnxscript_apis, OPTIMIZE, _noting(optimize, weights)))
        yield weights
