"""The inputs and outputs of a unit (a part of a network), and which of its layers read the same tensor."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from calib.hooks import input_hooks, output_hooks, removed
from calib.modules import returned
from calib.structure.in_front import in_front


class _ReachedError(Exception):
    """Ends a forward pass as soon as the unit has returned."""


@dataclass(frozen=True)
class UnitIO:
    """The `inputs` and `outputs` of a unit, images along the first axis, and its further arguments."""

    inputs: Tensor
    outputs: Tensor
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def run(self, unit: nn.Module, x: Tensor) -> Tensor:
        """The output of `unit`, the first one if it returns several, for `x` with the recorded further arguments."""
        return returned(unit(x, *self.args, **self.kwargs))


@torch.no_grad()
def unit_io(net: nn.Module, unit: str, batches: Iterable[Tensor]) -> UnitIO:
    """The inputs and outputs of `unit` when `net` runs on `batches`; nothing behind the unit is computed.

    Of a unit that is called several times, those of its first call.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    outputs: list[Tensor] = []

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        outputs.append(returned(output))
        raise _ReachedError

    module = net.get_submodule(unit)
    handles = [
        # the first of all: what stands in front of a layer runs again with it
        module.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
        module.register_forward_hook(after),
    ]
    with removed(handles):
        for batch in batches:
            with suppress(_ReachedError):
                net(batch)
    args, kwargs = calls[0]
    return UnitIO(torch.cat([call[0][0] for call in calls]), torch.cat(outputs), args[1:], kwargs)


@torch.no_grad()
def readers_and_sizes(
    net: nn.Module, layers: Sequence[str], run: Callable[[], object]
) -> tuple[list[list[str]], dict[str, float]]:
    """(groups of layers that read the same tensor, layer -> standard deviation of its output), observed while `run` runs."""
    read: dict[str, list[Tensor]] = {}  # one tensor per call
    sizes: dict[str, float] = {}
    with (
        input_hooks(net, layers, lambda name, _layer, x: read.setdefault(name, []).append(x), first=True),
        output_hooks(net, layers, lambda name, y: sizes.update({name: float(y.std())})),
    ):
        run()
    # by identity, which is unique because `read` keeps the tensors alive; readers of one tensor have the same in front
    groups: dict[tuple[int | bool, ...], list[str]] = {}
    for name, calls in read.items():
        scaled = in_front(net.get_submodule(name)) is not None
        groups.setdefault((scaled, *map(id, calls)), []).append(name)
    return list(groups.values()), sizes
