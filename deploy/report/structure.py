"""What the tool found in a network, as text: layers, what stays in float and why, places for channel scales, blocks."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from calib.structure.moves import FRONT

if TYPE_CHECKING:
    from calib.structure.structure import Structure


def structure_json(structure: "Structure") -> dict[str, Any]:
    """Plain values of the structure, for `--json` and benchmarks/intake.py."""
    return {
        "kind": structure.kind,
        "quantized": [layer.name for layer in structure.layers.values() if layer.why_float is None],
        "float": {
            **{layer.name: layer.why_float for layer in structure.layers.values() if layer.why_float is not None},
            **structure.unknown,
        },
        "places": [
            {"kind": place.kind, "producer": place.producer, "readers": list(place.readers), "shifts": place.shifts}
            for place in structure.places
        ],
        "refused_places": [
            {"kind": place.kind, "producer": place.producer, "readers": list(place.readers), "difference": apart}
            for place, apart in structure.refused
        ],
        "blocks": [{"name": block.name, "channels_last": block.channels_last} for block in structure.blocks.values()],
        "int8_attention": list(structure.attentions),
        "float_attention": structure.float_attentions,
    }


def _wrapped(names: Iterable[str], width: int = 110) -> Iterator[str]:
    line = ""
    for name in names:
        if line and len(line) + len(name) + 2 > width:
            yield f"    {line},"
            line = ""
        line = f"{line}, {name}" if line else name
    if line:
        yield f"    {line}"


def _by_reason(title: str, reasons: Mapping[str, str]) -> Iterator[str]:
    """Yield each reason once, behind `title`, with the names that it holds for."""
    names_of: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names_of.setdefault(reason, []).append(name or "in the network's own code")
    for reason, names in names_of.items():
        yield f"{title} ({len(names)}): {reason}"
        yield from _wrapped(names)


def _place(place: dict[str, Any]) -> str:
    """Return from where to where a scale moves; one in front of layers is absorbed by nothing before them."""
    before = "in front of" if place["kind"] == FRONT else f"{place['producer']} ->"
    return f"{before} {' & '.join(place['readers'])}"


def structure_lines(structure: "Structure") -> Iterator[str]:
    """Yield the report line by line."""
    found = structure_json(structure)
    yield structure.summary()
    yield f"quantized to INT8 ({len(found['quantized'])}){':' * bool(found['quantized'])}"
    yield from _wrapped(found["quantized"])
    yield from _by_reason("in float", found["float"])
    if found["places"]:
        yield f"channel scales can move ({len(found['places'])}), + where a shift can as well:"
        yield from _wrapped(_place(each) + " +" * each["shifts"] for each in found["places"])
    for each in found["refused_places"]:
        yield f"not moved, a trial changed the output by {each['difference']:.1e}: {_place(each)}"
    for title, names in (
        ("blocks that a branch can stand beside", [block["name"] for block in found["blocks"]]),
        ("attentions that INT8 kernels can compute", found["int8_attention"]),
    ):
        yield f"{title} ({len(names)}){':' if names else ''}"
        if names:
            yield from _wrapped(names)
    yield from _by_reason("attentions in FP16", found["float_attention"])
