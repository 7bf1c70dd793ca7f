"""What a network tells of itself, as one value: read from a trace; the places for scales are proved on an example."""

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from calib.structure.blocks import Block, blocks_of
from calib.structure.channels import PASSED_ON, readers_by_tensor, source_of
from calib.structure.layers import Layer, layers_of, not_plain, plain_calls
from calib.structure.moves import NORM, Place
from calib.structure.places import places_of
from calib.structure.proof import move_by_chance, preserving
from calib.structure.shortcuts import shortcuts_of
from calib.structure.trace import Trace, aten, calls

PACKED = ("qkv", "proj", "q_norm", "k_norm", "num_heads", "head_dim")  # what INT8 attention takes of a module
# % of a layer's input that is not clipped, if the recipe gives no other. In a transformer a few huge activations per image
# carry the signal (DINOv2-S loses 14 dB at 99.99); elsewhere rare outliers would make the scale too large for all others
# (MobileNet-v2 loses 3 dB at 99.9999).
PERCENTILE_WITH_ATTENTION, PERCENTILE = 99.9999, 99.99
# branches that read the integers of a block's first, second layer behind a norm
SHARED_FORMS = ("shared", "shared_mlp")


@dataclass(frozen=True)
class Structure:
    """The structure of one network.

    `layers`: all Linear and convolution layers by name, those that stay in float with the reason. `unknown`: what computes
    like a layer and is none, with the reason. `places`: where channel scales can move; `refused`: places where a trial
    changed the function. `blocks` by name. `attentions`: modules with a packed qkv that can compute in INT8;
    `float_attentions`: the others, with the reason. `after_gelu`: layers that read what a GELU returns. `shared`: by block,
    form of a branch -> the layer whose integers it reads, named relative to the block. `shortcuts`: modules that return an
    operand of a residual sum beside a convolution -> layers to be quantized that read the same tensor. `read_together`:
    layers to be quantized that read one tensor, such as a separate query, key and value, wherever there are several.
    """

    kind: str  # the class of the network
    layers: dict[str, Layer]
    unknown: dict[str, str] = field(default_factory=dict)
    places: tuple[Place, ...] = ()
    refused: tuple[tuple[Place, float], ...] = ()
    blocks: dict[str, Block] = field(default_factory=dict)
    attentions: tuple[str, ...] = ()
    float_attentions: dict[str, str] = field(default_factory=dict)
    after_gelu: frozenset[str] = frozenset()
    shared: dict[str, dict[str, str]] = field(default_factory=dict)
    shortcuts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    read_together: tuple[tuple[str, ...], ...] = ()
    percentile: float = PERCENTILE

    def why_float(self, layer: str) -> str | None:
        """Return the reason why `layer` stays in FP16, or None if it is quantized."""
        return self.layers[layer].why_float if layer in self.layers else None

    def summary(self) -> str:
        """Return one line for the user."""
        floats = sum(layer.why_float is not None for layer in self.layers.values()) + len(self.unknown)
        counts = (
            (len(self.layers) + len(self.unknown) - floats, "layers to quantize"), (floats, "stay in float"),
            (len(self.places), "places for channel scales"), (len(self.blocks), "blocks"),
            (len(self.attentions), "attentions that can be INT8"),
        )  # fmt: skip
        return f"{self.kind}: " + ", ".join(f"{count} {what}" for count, what in counts)

    def place_of(self, reader: str) -> Place | None:
        """Return the place where scales move into `reader`, or None."""
        return next((place for place in self.places if reader in place.readers), None)


def _reaches(node: object, ends: Collection[fx.Node], trace: Trace, through: str = "") -> bool:
    """Whether `node` is one of `ends`, but for operators that pass values on and the module `through`."""
    while isinstance(node, fx.Node) and node not in ends:
        if node.target not in PASSED_ON and trace.owner(node) != through:
            return False
        node = node.args[0]
    return node in ends


def _why_attention_is_float(
    trace: Trace, node: fx.Node, nodes: Mapping[str, fx.Node], places: tuple[Place, ...]
) -> str:
    """Return why the attention `node` cannot be INT8, empty if it can; `nodes`: calls of layers by name."""
    name = trace.owner(node)
    module, scale = trace.net.get_submodule(name), node.kwargs.get("scale")
    if len(node.args) > 3 or any(node.kwargs.get(key) for key in ("attn_mask", "is_causal", "enable_gqa")):
        return "it has a mask, or fewer heads of keys than of queries, which no INT8 kernel takes"
    qkv, proj = (nodes.get(f"{name}.{layer}") for layer in ("qkv", "proj"))
    if qkv is None or proj is None:
        return "its query, key and value are not one layer 'qkv', followed by a layer 'proj'"
    if missing := [each for each in PACKED if not hasattr(module, each)]:
        return f"its module has no {', '.join(missing)}, which an INT8 attention takes from it as from timm's Attention"
    if scale is not None and not math.isclose(float(scale), float(module.head_dim) ** -0.5):  # type: ignore[arg-type]
        return "it scales its scores in another way than by the width of a head"
    factors = zip(node.args[:3], (f"{name}.q_norm", f"{name}.k_norm", ""), strict=True)
    if not all(_reaches(factor, [qkv], trace, norm) for factor, norm in factors):
        return "something other than a norm lies between 'qkv' and its scores, such as a rotation by positions"
    moved = any(place.readers == (f"{name}.proj",) and place.producer == f"{name}.qkv" for place in places)
    if not moved or not _reaches(proj.args[0], [node], trace):
        return "something lies between it and 'proj'"
    return ""


def _attentions(trace: Trace, plain: Mapping[fx.Node, str], places: tuple[Place, ...]) -> dict[str, str]:
    """Return the modules that compute attention, and why each cannot be INT8: empty for those that can.

    Those are one attention over a packed qkv and nothing else: no mask, position, gate or norm behind it. Query and key may
    have a norm; a shift can move through the values.
    """
    found: dict[str, str] = {}
    nodes = {name: node for node, name in plain.items()}
    for node in calls(trace.nodes, aten.scaled_dot_product_attention.default):
        name = trace.owner(node)
        found[name] = (
            "it computes several attentions" if name in found else _why_attention_is_float(trace, node, nodes, places)
        )
    for node in calls(trace.nodes, aten.softmax.int):
        own = trace.owner(node)
        for name in (own, own.rpartition(".")[0]):  # the softmax may be a module of its own
            if name and any(True for _ in calls(trace.owned.get(name, ()), aten.matmul.default)):
                found.setdefault(name, "its code multiplies query and key itself, to add something to the scores")
                break
    return found


def _behind_gelu(plain: Mapping[fx.Node, str]) -> frozenset[str]:
    """Return the layers that read what a GELU returns, in all their calls."""
    others = set()
    for node, name in plain.items():
        before = source_of(node.args[0], PASSED_ON)
        if before is None or before.target is not aten.gelu.default:
            others.add(name)
    return frozenset(plain.values()) - others


def _read_together(plain: Mapping[fx.Node, str], quantized: Collection[str]) -> tuple[tuple[str, ...], ...]:
    """Return the layers of `quantized` that read one tensor, wherever there are several; each of them is called once."""
    calls_of = Counter(plain.values())
    once = {node: name for node, name in plain.items() if calls_of[name] == 1 and name in quantized}
    return tuple(tuple(names) for names in readers_by_tensor(once).values() if len(names) > 1)


def _shared(
    trace: Trace,
    plain: Mapping[fx.Node, str],
    places: tuple[Place, ...],
    layers: Mapping[str, Layer],
    blocks: Mapping[str, Block],
) -> dict[str, dict[str, str]]:
    """Return, by block, the first quantized linear layer behind each of its norms: those that one norm feeds read alike."""
    fed = {name: place for place in places if place.kind == NORM for name in place.readers}
    found: dict[str, dict[str, str]] = {}
    for block in blocks.values():
        readers: dict[int, str] = {}  # norm -> its first reader
        for node, name in plain.items():
            linear = isinstance(trace.net.get_submodule(name), nn.Linear) and len(node.meta["val"].shape) >= 3
            if name.startswith(f"{block.name}.") and name in fed and linear and layers[name].why_float is None:
                readers.setdefault(id(fed[name]), name.removeprefix(f"{block.name}."))
        if block.channels_last and readers:
            found[block.name] = dict(zip(SHARED_FORMS, readers.values(), strict=False))
    return found


def structure_of(net: nn.Module, example: Tensor, trace: Trace | None = None) -> Structure:
    """Return the structure of `net` on `example` (1, 3, H, W); `trace`: that of the same modules, if there is one.

    Raises UserError if `torch.export` cannot trace the network.
    """
    trace = trace or Trace(net, example)
    plain = plain_calls(trace)
    layers = layers_of(trace, plain)
    quantized = [name for name, layer in layers.items() if layer.why_float is None]
    useful = [place for place in places_of(trace, plain, quantized) if {*quantized} & {*place.readers}]
    places, refused = preserving(net, useful, move_by_chance, example)
    blocks = blocks_of(trace, plain, quantized, example)
    attentions = _attentions(trace, plain, places)
    attention = any(True for _ in calls(trace.nodes, aten.scaled_dot_product_attention.default, aten.softmax.int))
    return Structure(
        type(net).__name__,
        layers,
        not_plain(trace, plain),
        places,
        refused,
        blocks,
        tuple(name for name, why in attentions.items() if not why),
        {name: why for name, why in attentions.items() if why},
        _behind_gelu(plain),
        _shared(trace, plain, places, layers, blocks),
        shortcuts_of(trace, plain, layers),
        _read_together(plain, quantized),
        PERCENTILE_WITH_ATTENTION if attention else PERCENTILE,
    )
