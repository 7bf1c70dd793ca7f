"""Fitting a network's layers one by one, from sums over their inputs, as many at a time as memory allows."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, Self, TypeVar

from torch import Tensor

from calib.images.batches import Half
from calib.layerwise.layer_sums import LayerSums, add_inputs, pooled
from calib.network.layer_rows import weight_matrix
from calib.network.rounded_layer import RoundedLayer
from calib.quant_model import QuantModel
from calib.store.watch import Watch

MEMORY = 4 << 30  # bytes of sums held at a time; more layers take more passes over the images
PARTS = 4  # sets of sums of each layer: the images of either half that choose, and the others


S = TypeVar("S", bound="Sums")


class Sums(Protocol):
    """Sums over rows of a layer's input that can be added up."""

    def update(self, x: Tensor, rounded: Tensor) -> None:
        """Add rows before and after rounding, both (T, G, K)."""

    def merge(self, other: Self) -> Self:
        """Return the sums over the rows of both operands."""


def parts(model: QuantModel) -> Iterator[list[str]]:
    """Yield the layers to be quantized, as many at a time as can share passes over the images within `MEMORY`."""
    part: list[str] = []
    held = 0
    for name in model.layers:
        groups, outputs, columns = weight_matrix(model.net.get_submodule(name)).shape
        size = 8 * PARTS * groups * (columns + 1) * (columns + 1 + outputs)
        if part and held + size > MEMORY:
            yield part
            part, held = [], 0
        part.append(name)
        held += size
    yield part


def fitted_layers(
    model: QuantModel,
    halves: Sequence[Half],
    rows: int,
    new_sums: Callable[[str], S],
    fit: Callable[[str, Sequence[S], Sequence[S]], Sequence[RoundedLayer]],
    watch: Watch,
) -> list[dict[str, RoundedLayer]]:
    """Return the layers that `fit` finds: on each half, then on all images; a layer without fits is left out.

    `fit(name, choose, halves)` gets the sums of the images that choose, by half, and those of all images of each half.
    `rows` of a layer's input over all images are enough.
    """
    share = max(1, rows // sum(len(half) for half in halves))
    found: list[dict[str, RoundedLayer]] = [{} for _ in range(len(halves) + 1)]
    done = 0
    for part in parts(model):
        sums = [[{name: new_sums(name) for name in part} for _ in range(2)] for _ in halves]
        for of_half, half in zip(sums, halves, strict=True):
            for of_role, images in zip(of_half, (half.choose, half.judge), strict=True):
                add_inputs(of_role, model, images, share)
        for name in part:
            choose, judge = ([of_half[role].pop(name) for of_half in sums] for role in range(2))
            whole = [one.merge(other) for one, other in zip(choose, judge, strict=True)]
            for layers, one in zip(found, fit(name, choose, whole) or (None,) * len(found), strict=True):
                if one is not None:
                    layers[name] = one
            done += 1
            watch.at(done, len(model.layers))
    return found


def best_fit(
    plain: RoundedLayer,
    options: Sequence[float],
    fit: Callable[[LayerSums, float], RoundedLayer],
    choose: Sequence[LayerSums],
    halves: Sequence[LayerSums],
) -> tuple[RoundedLayer, ...]:
    """Return the layer fitted with the best of `options` on each half and on all images; empty if `plain` is better.

    An option is measured by the layer's squared output error on the images of the other half that choose.
    """

    def error(layers: Sequence[RoundedLayer]) -> float:
        return sum(choose[index - 1].error(one) for index, one in enumerate(layers))

    tried = {option: [fit(sums, option) for sums in halves] for option in options}
    best = min(tried, key=lambda option: error(tried[option]))
    if error(tried[best]) >= error([plain] * len(halves)):
        return ()
    return (*tried[best], fit(pooled(halves), best))
