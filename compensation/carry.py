"""What the blocks of a network read, batch by batch, while earlier blocks get their branches."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from torch import Tensor, nn

from calib.images.batches import Batches
from calib.modules import returned


class Call(NamedTuple):
    """How a block is called: with `x` first, and what else it gets."""

    x: Tensor
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012 - never written to

    def run(self, block: nn.Module) -> Tensor:
        """The output of `block`, the first one if it returns several."""
        return returned(block(self.x, *self.args, **self.kwargs))


class _ReachedError(Exception):
    """Ends a forward pass at the block that was waited for."""


def call_of(net: nn.Module, block: str, x: Tensor, args: Sequence[Any] = (), kwargs: Mapping[str, Any] = {}) -> Call:
    """What `block` is called with when `net` runs on `x`, `args`, `kwargs`; nothing from there on is computed."""
    calls: list[Call] = []

    def stop(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call(args[0], args[1:], kwargs))
        raise _ReachedError

    handle = net.get_submodule(block).register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
    try:
        with suppress(_ReachedError):
            net(x, *args, **kwargs)
    finally:
        handle.remove()
    if not calls:
        raise ValueError(f"the network ran without calling block '{block}'")
    return calls[0]


Added = Callable[[Call], Tensor]  # how a block is called -> what a branch adds to the block's output


def plus(output: Tensor, added: Tensor) -> Tensor:
    """Return what a block returns with its branch: (B, H, W, C) plus (B, H W, C) where the branch reads tokens in a row."""
    return output + (added if added.dim() == output.dim() else added.reshape(output.shape))


class Carry:
    """The inputs of one block after another, along one network; one block input and output per batch stay in memory.

    `reading_on`: the blocks that read what the one before returned; to the others the network runs from its start, with the
    branches that it has by then.
    """

    def __init__(self, net: nn.Module, images: Batches, reading_on: Collection[str]) -> None:
        self.net, self.images, self.reading_on = net, images, reading_on
        self.inputs: list[Call] = []
        self.outputs: dict[int, Tensor] = {}

    def calls(self, block: str) -> Iterator[Call]:
        """Yield the calls of `block`, one per batch; the blocks before it must have been advanced past, in order."""
        if block not in self.reading_on:
            self.inputs = [call_of(self.net, block, batch) for batch in self.images]
        return iter(self.inputs)

    def keep(self, index: int, output: Tensor) -> None:
        """Remember that the current block gave `output` for batch `index`, before any branch."""
        self.outputs[index] = output

    def advance(self, branch: Added | None) -> None:
        """Go on to the next block: its inputs are the outputs kept, plus `branch` of the calls they came from."""
        for index in list(self.outputs):
            output, call = self.outputs.pop(index), self.inputs[index]
            self.inputs[index] = call._replace(x=output if branch is None else plus(output, branch(call)))
