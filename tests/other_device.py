"""A device that is not the CPU, where there is none: its tensors compute on the CPU, but refuse what a GPU refuses.

Under `other_device()` tensors made on or sent to `OTHER` cannot be combined with tensors of the CPU (but for scalars,
indices and copies), and become no numpy arrays. torch.export cannot trace them.
"""

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

OTHER = torch.device("meta")  # a device that torch knows everywhere, whose own operators are never reached
aten = torch.ops.aten
ACROSS = {aten.copy_.default, aten._to_copy.default, aten.set_.source_Tensor}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}


class OnOther(torch.Tensor):
    """A tensor on the other device; `inner` holds its numbers."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=OTHER,
        )

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"OnOther({self.inner})"

    @property
    def data(self):
        return OnOther(self.inner.detach())

    @data.setter
    def data(self, value):
        self.inner = value.inner

    def __getitem__(self, index):
        return super().__getitem__(_with_numbers(index))

    def __setitem__(self, index, value):
        super().__setitem__(_with_numbers(index), value)

    def tolist(self):
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


def _with_numbers(index):
    """An index in which lists are tensors of the CPU: torch would make them on the device, without numbers."""
    if isinstance(index, tuple):
        return tuple(_with_numbers(each) for each in index)
    return torch.tensor(index, device="cpu") if isinstance(index, list) else index


@torch.no_grad()  # which the line below undoes
@torch.inference_mode(False)  # in that mode a view of a tensor from outside cannot be wrapped
def _compute(func, args, kwargs):
    given = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
    here = [each for each in given if not isinstance(each, OnOther)]
    assert not any(each.is_meta for each in here), f"{func}: a tensor was made past this emulation, without numbers"
    there = len(here) < len(given)
    alone = here if func not in INDEXED else [each for each in here if each is args[0]]
    if there and func not in ACROSS and any(each.ndim for each in alone):
        raise RuntimeError(f"{func}: tensors on two devices, {[tuple(each.shape) for each in given]}")
    if not there and isinstance(kwargs.get("generator"), torch.Generator) and kwargs.get("device") == OTHER:
        raise RuntimeError(f"{func}: a generator of the CPU cannot make numbers on another device")
    asked = kwargs.get("device")
    if asked is not None:
        there = torch.device(asked) == OTHER
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(lambda each: each.inner if isinstance(each, OnOther) else each, (args, kwargs))
    returned = func(*args, **kwargs)
    inner = {id(each.inner): each for each in given if isinstance(each, OnOther)}  # what is edited in place

    def wrapped(each):
        if not isinstance(each, torch.Tensor) or not there:
            return each
        return inner[id(each)] if id(each) in inner else OnOther(each)

    if func is aten._local_scalar_dense.default:
        return returned
    return tree_map(wrapped, returned)


class _Made(TorchDispatchMode):
    """Sends what is made on the other device there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        concerned = kwargs.get("device") is not None or any(
            isinstance(each, OnOther) for each in tree_flatten((args, kwargs))[0]
        )
        return _compute(func, args, kwargs) if concerned else func(*args, **kwargs)


class _Written(TorchFunctionMode):
    """The same for torch.tensor, which leaves out the numbers on a device that has none."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") == OTHER:
            return torch.tensor(*args, **{**kwargs, "device": torch.device("cpu")}).to(OTHER)
        return func(*args, **kwargs)


@contextmanager
def other_device():
    with _Written(), _Made():
        yield OTHER
