"""Are the blocks of a network a chain, each reading what the one before returned? Checked by running it once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn

from calib.quant_model import QuantModel
from compensation.layout import Layout, layout_from_shapes


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first is second or torch.equal(first, second)
    return type(first) is type(second) and bool(first == second)


def _same_extras(first: tuple[tuple, dict], second: tuple[tuple, dict]) -> bool:
    (args, kwargs), (others, other_kwargs) = first, second
    if len(args) != len(others) or kwargs.keys() != other_kwargs.keys():
        return False
    pairs = [*zip(args, others, strict=True), *((kwargs[key], other_kwargs[key]) for key in kwargs)]
    return all(_same(*pair) for pair in pairs)


def block_layouts(model: QuantModel, net: nn.Module, images: Tensor) -> dict[str, Layout]:
    """How a branch sees each block of `net`, a form of the network of `model`, found by running it on `images`.

    Raises ValueError naming the blocks if they are no chain, or one that no branch can serve.
    """
    blocks = model.structure.blocks
    shapes = chain_shapes(net, tuple(blocks), images)
    return {name: layout_from_shapes(name, *shape, blocks[name].channels_last) for name, shape in shapes.items()}


def chain_shapes(net: nn.Module, blocks: Sequence[str], images: Tensor) -> dict[str, tuple[Size, Size]]:
    """Shapes (input, output) of every block of `net` on `images`.

    Raises ValueError naming the blocks if one does not read what the one before returned, if they get different further
    arguments, or if one edits its input (a branch could not read it any more).
    """
    shapes: dict[str, tuple[Size, Size]] = {}
    state: dict[str, Any] = {}

    def before(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if "last" in state:
            if not _same(args[0], state["output"]):
                raise ValueError(
                    f"block '{name}' does not read what block '{state['last']}' returns: only a chain of blocks can be "
                    f"compensated one by one"
                )
            if not _same_extras((args[1:], kwargs), state["extras"]):
                raise ValueError(f"block '{name}' gets other further arguments than block '{state['last']}'")
        state.update(extras=(args[1:], kwargs), version=args[0]._version)

    def after(name: str, args: tuple[Any, ...], output: Tensor) -> None:
        if args[0]._version != state["version"]:
            raise ValueError(f"block '{name}' edits its input in place: a branch cannot read it any more")
        shapes[name] = args[0].shape, output.shape
        state.update(last=name, output=output)

    handles = []
    for name in blocks:
        block = net.get_submodule(name)
        handles += [
            block.register_forward_pre_hook(lambda _m, a, k, name=name: before(name, a, k), with_kwargs=True),
            block.register_forward_hook(lambda _m, a, y, name=name: after(name, a, y)),
        ]
    try:
        with torch.no_grad():  # not inference mode: its tensors do not count their edits
            net(images)
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for name in blocks if name not in shapes]:
        raise ValueError(f"the network ran without calling block '{missing[0]}'")
    return shapes
