"""The families of networks as data: one file per family, with one value `FAMILY` in it."""

import importlib
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from calib.errors import UserError
from calib.structure.moves import Move


@dataclass(frozen=True)
class Family:
    """What the tool has to know about one family of networks.

    networks: the timm classes that the family describes.
    modules: every module class that may occur inside; a variant with another one is refused by name.
    block: a regular expression that matches the names of the blocks.
    float_layers: the Linear and Conv2d layers that stay in FP16, as (regular expression over layer names, reason).
    percentile: % of a layer input that is not clipped, if the recipe gives no other.
    moves: where scale migration is possible (calib/structure/moves.py).
    attention: a regular expression for the names of attention modules with a packed qkv (calib/attention/int8.py).
    after_gelu: a regular expression for the names of layers that may read the output of a GELU.
    channels_last: whether blocks return tokens (B, ..., C) instead of feature maps (B, C, H, W).
    shared: forms of branches (compensation/forms.py) that read the integers of a layer -> the name of that layer in
        every block.
    """

    name: str
    networks: frozenset[str]
    modules: frozenset[str]
    block: str
    float_layers: tuple[tuple[str, str], ...]
    percentile: float
    moves: tuple[Move, ...] = ()
    attention: str = "(?!)"  # matches nothing
    after_gelu: str = "(?!)"
    channels_last: bool = False
    shared: Mapping[str, str] = field(default_factory=dict)

    def float_reason(self, layer: str) -> str | None:
        """The reason why `layer` stays in FP16, or None if it is quantized."""
        return next((why for pattern, why in self.float_layers if re.fullmatch(pattern, layer)), None)

    def blocks(self, net: nn.Module) -> tuple[str, ...]:
        """The names of the blocks of `net`, in the order of definition."""
        return tuple(name for name, _ in net.named_modules() if re.fullmatch(self.block, name))

    def attentions(self, net: nn.Module) -> tuple[str, ...]:
        """The names of the attention modules of `net`, in the order of definition."""
        return tuple(name for name, _ in net.named_modules() if re.fullmatch(self.attention, name))


def families() -> dict[str, Family]:
    """All families in this folder by name."""
    found = (importlib.import_module(f"{__name__}.{item.name}") for item in pkgutil.iter_modules(__path__))
    return {module.FAMILY.name: module.FAMILY for module in found}


def family_of(net: nn.Module) -> Family:
    """The family that describes `net`.

    Raises UserError if no family describes the class of the network or one of the modules inside; the message names it.
    """
    known = families()
    kind = type(net).__name__
    family = next((family for family in known.values() if kind in family.networks), None)
    if family is None:
        supported = ", ".join(f"{f.name} ({', '.join(sorted(f.networks))})" for f in known.values())
        raise UserError(
            f"unsupported architecture: {kind} is described by no family; supported: {supported}. "
            f"To add one, write calib/families/<name>.py"
        )
    for name, module in net.named_modules():
        if type(module).__name__ not in family.modules | family.networks:
            raise UserError(
                f"unsupported architecture: module '{name}' is a {type(module).__name__}, which family "
                f"'{family.name}' does not describe; add it to calib/families/{family.name}.py if it is safe to round"
            )
    return family
