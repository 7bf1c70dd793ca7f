"""What makes torch.onnx.export quicker and leaves its graphs byte for byte as they are."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.nn import functional as F

from calib.quiet import no_collection

try:
    from torch.onnx._internal.exporter._registration import onnxscript_apis as library
except ImportError:  # torch's own name: in a version without it exports take longer
    library = None  # type: ignore[assignment]

READ = "get_torchlib_ops"  # a function of it, called at every export


@functools.cache
def _read_once(read: Callable[[], Any]) -> Any:
    return read()


def _hardtanh(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`F.hardtanh` that writes into its input by a copy, which the exporter leaves out.

    It takes ReLU6 in place apart in Python instead, operator by operator: half the time of a MobileNet.
    """

    def traced(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
        found = plain(input, min_val, max_val)
        return input.copy_(found) if inplace else found

    return traced


@contextmanager
def quick_export() -> Iterator[None]:
    """Exports inside read the operators that they know once in a process, which parses the source of 500 functions."""
    once: AbstractContextManager[Any] = nullcontext()
    if read := getattr(library, READ, None):
        once = patch.object(library, READ, lambda: _read_once(read))
    with once, patch.object(F, "hardtanh", _hardtanh(F.hardtanh)), no_collection():
        yield
