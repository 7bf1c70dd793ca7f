"""Where the branches of a network go: the blocks that one can stand beside, and what it can read there."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Size, Tensor, nn

from calib.grids import why_not_int8
from calib.hooks import input_hooks
from calib.quant_model import QuantModel
from calib.quantizer import QParams
from compensation.block_calls import reads_on, seen_blocks
from compensation.forms import Place
from compensation.layout import layout_from_shapes


@dataclass(frozen=True)
class Places:
    """`of`: by block, in the order in which they run. `refused`: blocks that no branch can stand beside, with the reason.

    `reading_on`: blocks that read what the one before returned.
    """

    of: Mapping[str, Place]
    refused: Mapping[str, str]
    reading_on: frozenset[str]


def _aligned(read: Size, returned: Size) -> bool:
    """Whether a layer that reads (B, ..., C) has one row for every row of (B, ..., C'), image by image."""
    return read[0] == returned[0] and read[:-1].numel() == returned[:-1].numel()


def _shared_scales(model: QuantModel, block: str) -> dict[str, tuple[str, QParams]]:
    """Return, by form, the INT8 layer of `block` whose integers a branch may read, with their scale."""
    found = {}
    for form, reader in model.structure.shared.get(block, {}).items():
        grid, alone = model.quantizers.get(f"{block}.{reader}:input"), f"{block}.{reader}" in model.int8_products
        # an INT8 branch reads its integers and joins its product, which then is written in FP16
        if isinstance(grid, QParams) and not why_not_int8(grid) and not alone:
            found[form] = (reader, grid)
    return found


def places(model: QuantModel, net: nn.Module, images: Tensor) -> Places:
    """Return where branches go in `net`, the quantized network of `model`, found by running it on `images`.

    Raises ValueError naming the block if one is not called, or edits its input.
    """
    blocks = model.structure.blocks
    scales = {name: _shared_scales(model, name) for name in blocks}
    read: dict[str, Size] = {}
    readers = [f"{name}.{reader}" for name, found in scales.items() for reader, _ in found.values()]
    with input_hooks(net, readers, lambda name, _layer, x: read.__setitem__(name, x.shape)):
        seen = seen_blocks(net, tuple(blocks), images)
    found: dict[str, Place] = {}
    refused: dict[str, str] = {}
    for name, (call, output) in seen.items():
        try:
            layout = layout_from_shapes(name, call.x.shape, output.shape, blocks[name].channels_last)
        except ValueError as reason:
            refused[name] = str(reason)
            continue
        shared = {
            form: (reader, grid)
            for form, (reader, grid) in scales[name].items()
            if _aligned(read[f"{name}.{reader}"], output.shape)
        }
        found[name] = Place(layout, shared)
    return Places(found, refused, frozenset(reads_on(seen, found)))
