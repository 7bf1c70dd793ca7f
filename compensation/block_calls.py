"""How a network calls its blocks, found by running it once: what each is given and returns, and which read on from which."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from calib.hooks import removed
from calib.modules import returned
from compensation.carry import Call


class Seen(NamedTuple):
    """One call of a block, and the tensor that it returned."""

    call: Call
    output: Tensor


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first is second or torch.equal(first, second)
    return type(first) is type(second) and bool(first == second)


def _same_extras(one: Call, other: Call) -> bool:
    if len(one.args) != len(other.args) or one.kwargs.keys() != other.kwargs.keys():
        return False
    pairs = [*zip(one.args, other.args, strict=True), *((one.kwargs[key], other.kwargs[key]) for key in one.kwargs)]
    return all(_same(*pair) for pair in pairs)


def seen_blocks(net: nn.Module, blocks: Sequence[str], images: Tensor) -> dict[str, Seen]:
    """Return what the blocks of `net` are given and return on `images`, in the order in which they run.

    Raises ValueError naming the block if one is not called, or edits its input (a branch could not read it any more).
    """
    found: dict[str, Seen] = {}
    versions: dict[str, int] = {}

    def before(name: str, args: tuple[Any, ...]) -> None:
        versions[name] = args[0]._version

    def after(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if args[0]._version != versions[name]:
            raise ValueError(f"block '{name}' edits its input in place: a branch cannot read it any more")
        found[name] = Seen(Call(args[0], args[1:], kwargs), returned(output))

    handles = []
    for name in blocks:
        block = net.get_submodule(name)
        handles += [
            block.register_forward_pre_hook(lambda _m, args, name=name: before(name, args)),
            block.register_forward_hook(lambda _m, a, k, y, name=name: after(name, a, k, y), with_kwargs=True),
        ]
    with removed(handles), torch.no_grad():  # not inference mode: its tensors do not count their edits
        net(images)
    if missing := [name for name in blocks if name not in found]:
        raise ValueError(f"the network ran without calling block '{missing[0]}'")
    return found


def reads_on(seen: Mapping[str, Seen], blocks: Iterable[str]) -> set[str]:
    """Return those of `blocks`, in the order in which they run, that read what the one before returned.

    Their further arguments, such as masks, are those of the one before too. A block behind a patch merging is not one.
    """
    found: set[str] = set()
    before: Seen | None = None
    for name in blocks:
        now = seen[name]
        if before and _same(now.call.x, before.output) and _same_extras(now.call, before.call):
            found.add(name)
        before = now
    return found
