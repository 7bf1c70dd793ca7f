"""What makes torch.onnx.export quicker and leaves its graphs byte for byte as they are."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.onnx._internal.exporter import _registration

from calib.quiet import no_collection


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
    library, plain = _registration.onnxscript_apis, F.hardtanh
    read = library.get_torchlib_ops
    F.hardtanh, library.get_torchlib_ops = _hardtanh(plain), lambda: _read_once(read)
    try:
        with no_collection():
            yield
    finally:
        F.hardtanh, library.get_torchlib_ops = plain, read
