"""What a part of a network reads and returns, and which of its layers read the same tensor."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from calib.hooks import input_hooks, output_hooks


class _ReachedError(Exception):
    """Ends a forward pass behind the unit that was waited for."""


@dataclass(frozen=True)
class UnitIO:
    """`inputs` and `outputs` (images first) of a unit, and what else it is called with."""

    inputs: Tensor
    outputs: Tensor
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def run(self, unit: nn.Module, x: Tensor) -> Tensor:
        """What `unit` makes of `x`."""
        return unit(x, *self.args, **self.kwargs)


@torch.no_grad()
def unit_io(net: nn.Module, unit: str, batches: Iterable[Tensor]) -> UnitIO:
    """What `unit` reads and returns when `net` runs on `batches`; nothing behind it is computed."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    outputs: list[Tensor] = []

    def after(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        calls.append((args, kwargs))
        outputs.append(output)
        raise _ReachedError

    handle = net.get_submodule(unit).register_forward_hook(after, with_kwargs=True)
    try:
        for batch in batches:
            with suppress(_ReachedError):
                net(batch)
    finally:
        handle.remove()
    args, kwargs = calls[0]
    return UnitIO(torch.cat([call[0][0] for call in calls]), torch.cat(outputs), args[1:], kwargs)


@torch.no_grad()
def readers_and_sizes(
    net: nn.Module, layers: Sequence[str], run: Callable[[], object]
) -> tuple[list[list[str]], dict[str, float]]:
    """(layers grouped by the tensor they read, standard deviation of each layer's output) while `run` runs `net`."""
    read: dict[str, Tensor] = {}
    sizes: dict[str, float] = {}
    with (
        input_hooks(net, layers, lambda name, _layer, x: read.update({name: x})),
        output_hooks(net, layers, lambda name, y: sizes.update({name: float(y.std())})),
    ):
        run()
    groups: dict[int, list[str]] = {}  # by identity: the tensors are alive in `read`
    for name, x in read.items():
        groups.setdefault(id(x), []).append(name)
    return list(groups.values()), sizes
