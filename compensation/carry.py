"""What the blocks of a network read, batch by batch, while earlier blocks get their branches.

memory       every block input stays in memory: fastest, grows with the number of images
disk         the same in a temporary folder: one batch in memory at a time
recompute    nothing is kept: the network runs up to the block for every batch, L^2/2 block passes instead of L
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from calib.images.batches import Batches


class Call(NamedTuple):
    """How a block is called: with `x` first, and what else it gets."""

    x: Tensor
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012 - never written to

    def run(self, block: nn.Module) -> Tensor:
        """The output of `block`."""
        return block(self.x, *self.args, **self.kwargs)


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


class Folder(MutableMapping[int, Tensor]):
    """Tensors in files of `folder`, one per key."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._indices: set[int] = set()
        folder.mkdir()

    def _path(self, index: int) -> Path:
        return self._folder / f"{index}.npy"

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        np.save(self._path(index), tensor.numpy())
        self._indices.add(index)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.load(self._path(index)))

    def __delitem__(self, index: int) -> None:
        self._indices.remove(index)
        self._path(index).unlink()

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._indices))

    def __len__(self) -> int:
        return len(self._indices)


Added = Callable[[Call], Tensor]  # how a block is called -> what a branch adds to the block's output


class Carry(Protocol):
    """The inputs of one block after another, along one network."""

    def calls(self, block: str) -> Iterator[Call]:
        """The calls of `block`, one per batch; the blocks before it must have been advanced past, in order."""

    def keep(self, index: int, output: Tensor) -> None:
        """Remember that the block now at turn gave `output` for batch `index`, before any branch."""

    def advance(self, branch: Added | None) -> None:
        """Go on to the next block: its inputs are the outputs kept, plus `branch` of the calls they came from."""


class Recomputed:
    """Runs `net` up to the block; branches must have been attached to it."""

    def __init__(self, net: nn.Module, images: Batches) -> None:
        self.net, self.images = net, images

    def calls(self, block: str) -> Iterator[Call]:
        """See Carry."""
        return (call_of(self.net, block, batch) for batch in self.images)

    def keep(self, index: int, output: Tensor) -> None:
        """Nothing to do: the next block's inputs are computed from the images."""

    def advance(self, branch: Added | None) -> None:
        """Nothing to do: the branch hangs in `net`."""


class Stored:
    """Keeps the block inputs in `inputs` (empty) and the outputs, until the pass is over, in `outputs` (empty)."""

    def __init__(
        self, net: nn.Module, images: Batches, inputs: MutableMapping[int, Tensor], outputs: MutableMapping[int, Tensor]
    ) -> None:
        self.net, self.images = net, images
        self.inputs, self.outputs = inputs, outputs
        self.extras: list[Call] = []

    def calls(self, block: str) -> Iterator[Call]:
        """See Carry."""
        if not self.inputs:
            for index, batch in enumerate(self.images):
                call = call_of(self.net, block, batch)
                self.inputs[index] = call.x
                self.extras.append(call._replace(x=torch.empty(0)))
        return (extra._replace(x=self.inputs[index]) for index, extra in enumerate(self.extras))

    def keep(self, index: int, output: Tensor) -> None:
        """See Carry."""
        self.outputs[index] = output

    def advance(self, branch: Added | None) -> None:
        """See Carry."""
        for index in list(self.outputs):
            output = self.outputs.pop(index)
            call = self.extras[index]._replace(x=self.inputs[index])
            self.inputs[index] = output if branch is None else output + branch(call)


@contextmanager
def in_memory(net: nn.Module, images: Batches) -> Iterator[Carry]:
    """A carry that grows by one block input and one block output per batch."""
    yield Stored(net, images, {}, {})


@contextmanager
def on_disk(net: nn.Module, images: Batches) -> Iterator[Carry]:
    """A carry that holds one batch; its files are gone when the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        yield Stored(net, images, Folder(Path(folder, "inputs")), Folder(Path(folder, "outputs")))


@contextmanager
def recomputed(net: nn.Module, images: Batches) -> Iterator[Carry]:
    """A carry that holds nothing."""
    yield Recomputed(net, images)


CARRIES = {"memory": in_memory, "disk": on_disk, "recompute": recomputed}
