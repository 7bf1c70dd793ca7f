"""The noun that flows through the torch half: a float network and what has been decided about its rounding."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from calib.device import CPU
from calib.errors import UserError
from calib.grids import Grid
from calib.precision import INT8_ENGINE, LayerBits, Precision
from calib.quantizer import QParams
from calib.structure.moves import Moved
from calib.structure.structure import Structure

ATTENTION_ROLES = ("query", "key", "softmax", "value")  # what rounds in an INT8 attention: all of it or nothing


@dataclass(frozen=True)
class StageRecord:
    """What one stage did: its options, seconds, error before and after (dB SQNR, None if not measured), notes.

    The error is that of the network's output on held-out images. `details`: figures for the report, JSON values by name;
    what later stages need is a field of `QuantModel`.
    """

    stage: str
    config: dict[str, Any]
    seconds: float = 0.0
    sqnr_before_db: float | None = None
    sqnr_after_db: float | None = None
    notes: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for manifest and report."""
        return asdict(self)


def _on_device(value: Any, device: torch.device) -> Any:
    """Return `value` with the tensors in it on `device`; modules are edited."""
    if isinstance(value, Tensor | nn.Module):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _on_device(each, device) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(_on_device(each, device) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: _on_device(getattr(value, each.name), device) for each in fields(value)})
    return value


class Branch(Protocol):
    """A float path beside a quantized block, whose output is added to the block's."""

    def attach(self, block: nn.Module) -> None:
        """Make `block` return its output plus the branch's (edits `block`)."""


@dataclass(frozen=True)
class QuantModel:
    """A network on its way to integers. Stages return a new value; `float_net` is never edited.

    `net` is what has become of the network so far. `exact_net` is `float_net` in the coordinates of `net` (BatchNorm
    folded, channels equalised), so that single blocks can be compared: stages that move coordinates set both, stages that
    change the function set `net` alone. They are one object until then, and nobody edits it.

    `structure` says what `net` consists of (calib/structure/structure.py): it is read once BatchNorm is folded.

    `quantizers` maps every tensor that rounds to its grid: `blocks.3.attn.qkv:input` (an activation),
    `blocks.3.attn.qkv:weight`. A layer is quantized when both are there, an attention when all four of its roles are. With
    `blocks.3.attn.qkv:output` the matrix product of a layer rounds too (calib/layerwise/int8_products.py), with
    `layer1.0:shortcut` what a module returns (calib/layerwise/int8_shortcuts.py).
    `moved` holds the channel scales already in `net`, `precision` the bits. `branches` maps blocks to what runs beside
    them, `branch_figures` to what is known of these branches (JSON values).

    `equalised` maps layers to the (exponent, centred) of their channel scales, which tell how one half of the calibration
    images alone would set them; `half_thresholds` maps layers to the clipping threshold that each half would give.
    `kept_float`: layers that could be quantized and went back to FP16, with the reason.
    """

    name: str
    float_net: nn.Module
    net: nn.Module
    exact_net: nn.Module
    structure: Structure
    quantizers: dict[str, Grid] = field(default_factory=dict)
    history: tuple[StageRecord, ...] = ()
    branches: dict[str, Branch] = field(default_factory=dict)
    branch_figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    moved: tuple[Moved, ...] = ()
    equalised: dict[str, tuple[float, bool]] = field(default_factory=dict)
    half_thresholds: dict[str, tuple[float, ...]] = field(default_factory=dict)
    kept_float: dict[str, str] = field(default_factory=dict)
    precision: Precision = INT8_ENGINE

    @classmethod
    def of(
        cls, name: str, net: nn.Module, structure: Structure | None = None, precision: Precision = INT8_ENGINE
    ) -> "QuantModel":
        """Return the float network `net` of which nothing is quantized yet; without `structure`, folding reads it."""
        return cls(name, net, net, net, structure or Structure(type(net).__name__, {}), precision=precision)

    @property
    def device(self) -> torch.device:
        """The device that the networks are on."""
        return next((each.device for each in self.net.parameters()), CPU)

    def to(self, device: torch.device) -> "QuantModel":
        """A copy with all tensors on `device`; itself if they are there."""
        if self.device == device:
            return self
        # one copy of everything together: networks that are one object stay one
        kept = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "structure"}
        return replace(self, **_on_device(copy.deepcopy(kept), device))

    def without_networks(self) -> "QuantModel":
        """A copy without the three networks, which are most of its memory: empty modules stand in their place."""
        return replace(self, float_net=nn.Module(), net=nn.Module(), exact_net=nn.Module())

    def with_quantizers(self, quantizers: Mapping[str, Grid]) -> "QuantModel":
        """A copy with `quantizers` added (same names replaced)."""
        return replace(self, quantizers={**self.quantizers, **quantizers})

    def with_record(self, record: StageRecord) -> "QuantModel":
        """A copy with `record` appended to the history."""
        return replace(self, history=(*self.history, record))

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the Linear and Conv2d layers to be quantized, in the order of definition."""
        return tuple(
            layer.name
            for layer in self.structure.layers.values()
            if layer.why_float is None or (self.precision.first_last and layer.roundable)
        )

    def bits(self, layer: str) -> LayerBits:
        """Bits of the weight and the input of `layer`."""
        if self.structure.why_float(layer) is not None:
            return LayerBits(self.precision.first_last, self.precision.first_last)
        return LayerBits(self.precision.weights, self.precision.inputs)

    def qparams(self, quantizer: str) -> QParams:
        """The grid of `quantizer`, which has to be uniform. Raises UserError naming the quantizer."""
        grid = self.quantizers[quantizer]
        if not isinstance(grid, QParams):
            raise UserError(
                f"quantizer '{quantizer}' has a {type(grid).__name__} grid, which is simulated only: expected a uniform one"
            )
        return grid

    @property
    def quantized_layers(self) -> tuple[str, ...]:
        """Names of the Linear and Conv2d layers whose input and weight both round."""
        return tuple(name for name in self._with_role("input") if f"{name}:weight" in self.quantizers)

    @property
    def int8_products(self) -> tuple[str, ...]:
        """Names of the layers whose matrix product is written in INT8."""
        return self._with_role("output")

    @property
    def int8_shortcuts(self) -> tuple[str, ...]:
        """Names of the modules whose output goes around a block in INT8."""
        return self._with_role("shortcut")

    def _with_role(self, role: str) -> tuple[str, ...]:
        """Names of what has a quantizer `<name>:<role>`."""
        return tuple(name for name, _, found in (each.rpartition(":") for each in self.quantizers) if found == role)

    @property
    def int8_attention(self) -> tuple[str, ...]:
        """Names of the attention modules that compute in INT8."""
        names = self._with_role("softmax")
        return tuple(name for name in names if all(f"{name}:{role}" in self.quantizers for role in ATTENTION_ROLES))

    @property
    def float_layers(self) -> dict[str, str]:
        """Linear and convolution layers that stay in FP16, with the reason."""
        layers = {*self.layers}
        reasons = {layer.name: layer.why_float for layer in self.structure.layers.values() if layer.name not in layers}
        every = {**reasons, **self.structure.unknown, **self.kept_float}
        return {name: reason for name, reason in every.items() if reason is not None}
