"""Forward hooks that observe or replace what layers read and return; they are removed when the `with` block ends."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

InputHook = Callable[[str, nn.Module, Tensor], Tensor | None]
OutputHook = Callable[[str, Tensor], Tensor | None]


@contextmanager
def removed(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove the hooks of `handles` when the `with` block ends."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def input_hooks(net: nn.Module, layers: Iterable[str], hook: InputHook, first: bool = False) -> Iterator[None]:
    """Call `hook(name, layer, x)` before each of `layers` reads x; a tensor that the hook returns is read instead.

    `first`: x is what the layer is called with, before what stands in front of it (calib/structure/in_front.py), so that
    the layer can be called with x again. Else x is what the layer itself reads.
    """

    def bound(name: str) -> Callable:
        def before(layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> tuple[Any, Any] | None:
            given = (*inputs, *named.values())  # a layer may be called as layer(input=x)
            replaced = hook(name, layer, given[0])
            if replaced is None:
                return None
            return ((replaced, *inputs[1:]), named) if inputs else ((), {**named, next(iter(named)): replaced})

        return before

    handles = [
        net.get_submodule(name).register_forward_pre_hook(bound(name), prepend=first, with_kwargs=True)
        for name in layers
    ]
    with removed(handles):
        yield


@contextmanager
def output_hooks(net: nn.Module, modules: Iterable[str], hook: OutputHook) -> Iterator[None]:
    """Call `hook(name, y)` after each of `modules` has returned y; a tensor that the hook returns is passed on instead.

    A hook that keeps y has to clone it: later modules may edit y in place.
    """
    handles = [
        net.get_submodule(name).register_forward_hook(lambda _m, _x, y, name=name: hook(name, y)) for name in modules
    ]
    with removed(handles):
        yield
