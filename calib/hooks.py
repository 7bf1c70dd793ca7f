"""Looking at what layers read (or replacing it) and return; the hooks are gone when the block ends."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

InputHook = Callable[[str, nn.Module, Tensor], Tensor | None]
OutputHook = Callable[[str, Tensor], Tensor | None]


@contextmanager
def input_hooks(net: nn.Module, layers: Iterable[str], hook: InputHook) -> Iterator[None]:
    """While open, `hook(name, layer, x)` runs before each of `layers` reads x; a tensor it returns is read instead."""

    def bound(name: str) -> Callable:
        def before(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            replaced = hook(name, layer, inputs[0])
            return None if replaced is None else (replaced, *inputs[1:])

        return before

    handles = [net.get_submodule(name).register_forward_pre_hook(bound(name)) for name in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def output_hooks(net: nn.Module, modules: Iterable[str], hook: OutputHook) -> Iterator[None]:
    """While open, `hook(name, y)` runs after each of `modules` has returned y; what it returns is passed on instead.

    Later modules may edit y in place.
    """
    handles = [
        net.get_submodule(name).register_forward_hook(lambda _m, _x, y, name=name: hook(name, y)) for name in modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
