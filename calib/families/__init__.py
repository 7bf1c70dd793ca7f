"""What the tool knows about each family of networks, as data: one file per family, one `FAMILY` value in it."""

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
    """Model knowledge of one family.

    `networks` are the timm classes it describes, `modules` every module class that may occur inside (so that a variant
    with an unknown part is refused by name instead of being quantized wrongly), `block` a regular expression that
    matches the names of the blocks, and `float_layers` the Linear/Conv2d layers left in FP16: pairs of a regular
    expression over layer names and the reason. `percentile` (%) is where activations are clipped when the recipe does
    not say. `moves`: where channel scales can move (calib/structure/moves.py). `attention`: a regular expression for
    the names of attention modules with a packed qkv (calib/attention/int8.py). `after_gelu`: one for the layers that
    may read what a GELU returns. `channels_last`: blocks pass tokens (B, ..., C) on, not maps (B, C, H, W).
    `shared`: forms of branches (compensation/forms.py) that read the integers of a layer, with the name of that
    layer within every block.
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
        """Why `layer` stays in FP16, or None if it is to be quantized."""
        return next((why for pattern, why in self.float_layers if re.fullmatch(pattern, layer)), None)

    def blocks(self, net: nn.Module) -> tuple[str, ...]:
        """Names of the blocks of `net`, in the order of definition."""
        return tuple(name for name, _ in net.named_modules() if re.fullmatch(self.block, name))

    def attentions(self, net: nn.Module) -> tuple[str, ...]:
        """Names of the attention modules of `net`, in the order of definition."""
        return tuple(name for name, _ in net.named_modules() if re.fullmatch(self.attention, name))


def families() -> dict[str, Family]:
    """Every family in this folder by name."""
    found = (importlib.import_module(f"{__name__}.{item.name}") for item in pkgutil.iter_modules(__path__))
    return {module.FAMILY.name: module.FAMILY for module in found}


def family_of(net: nn.Module) -> Family:
    """The family that describes `net`.

    Raises UserError naming the network class, or the first module inside it, that no family knows.
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
