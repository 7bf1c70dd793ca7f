"""Fitting a network's layers one by one, from sums over their inputs, as many at a time as memory allows."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, Self, TypeVar

from torch import Tensor

from calib.images.batches import ROTATIONS, Half
from calib.layerwise.layer_sums import LayerSums, add_inputs, pooled
from calib.network.layer_rows import weight_matrix
from calib.network.rounded_layer import RoundedLayer
from calib.quant_model import QuantModel
from calib.store.watch import Watch

MEMORY = 4 << 30  # bytes of sums held at a time; more layers take more passes over the images
PARTS = 4  # of the calibration images, each with sums of its own


S = TypeVar("S", bound="Sums")


class Sums(Protocol):
    """Sums over rows of a layer's input that can be added up."""

    def update(self, x: Tensor, rounded: Tensor) -> None:
        """Add rows before and after rounding, both (T, G, K)."""

    def merge(self, other: Self) -> Self:
        """Return the sums over the rows of both operands."""


def groups_of_layers(model: QuantModel) -> Iterator[list[str]]:
    """Yield the layers to be quantized, as many at a time as can share passes over the images within `MEMORY`."""
    group: list[str] = []
    held = 0
    for name in model.layers:
        groups, outputs, columns = weight_matrix(model.net.get_submodule(name)).shape
        size = 8 * PARTS * groups * (columns + 1) * (columns + 1 + outputs)
        if group and held + size > MEMORY:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    yield group


class LayerTrials(NamedTuple):
    """One layer fitted for each rotation and half (calib/judge/held_out.py), and on all images; None: `plain` is better."""

    trials: tuple[Sequence[RoundedLayer] | None, ...]
    whole: RoundedLayer | None


class FittedLayers(NamedTuple):
    """Fitted layers by name: `trials[r][i]` of rotation r and half i, `whole` of all images."""

    trials: list[list[dict[str, RoundedLayer]]]
    whole: dict[str, RoundedLayer]


def fitted_layers(
    model: QuantModel,
    halves: Sequence[Half],
    rows: int,
    new_sums: Callable[[str], S],
    fit: Callable[[str, Sequence[Sequence[S]]], LayerTrials],
    watch: Watch,
) -> FittedLayers:
    """Return the layers that `fit(name, sums)` finds; `sums[i][p]` are those over part p of half i.

    `rows` of a layer's input over all images are enough.
    """
    share = max(1, rows // sum(len(half) for half in halves))
    found = FittedLayers([[{} for _ in halves] for _ in ROTATIONS], {})
    done = 0
    for group in groups_of_layers(model):
        sums = [[{name: new_sums(name) for name in group} for _ in half.parts] for half in halves]
        for of_half, half in zip(sums, halves, strict=True):
            for of_part, part in zip(of_half, half.parts, strict=True):
                add_inputs(of_part, model, part, share)
        for name in group:
            trials, whole = fit(name, [[of_part.pop(name) for of_part in of_half] for of_half in sums])
            for of_rotation, layers in zip(found.trials, trials, strict=True):
                for of_half_layers, layer in zip(of_rotation, layers or (), strict=False):
                    of_half_layers[name] = layer
            if whole is not None:
                found.whole[name] = whole
            done += 1
            watch.at(done, len(model.layers))
    return found


def best_fit(
    plain: RoundedLayer,
    options: Sequence[float],
    fit: Callable[[LayerSums, float], RoundedLayer],
    sums: Sequence[Sequence[LayerSums]],
) -> LayerTrials:
    """Return the layer fitted with the best of `options`, by its squared output error on images that it was not fitted on.

    In each rotation one part of the other half chooses the option; both parts choose that of the layer fitted on all images.
    """
    halves = [pooled(of_half) for of_half in sums]
    tried = {option: [fit(of_half, option) for of_half in halves] for option in options}

    def error(layers: Sequence[RoundedLayer], parts: Sequence[int]) -> float:
        return sum(sums[index - 1][part].error(one) for index, one in enumerate(layers) for part in parts)

    def best(parts: Sequence[int]) -> float | None:
        option = min(tried, key=lambda each: error(tried[each], parts))
        return option if error(tried[option], parts) < error([plain] * len(halves), parts) else None

    chosen = [best([part]) for part, _ in ROTATIONS]
    of_all = best([part for part, _ in ROTATIONS])
    return LayerTrials(
        tuple(None if option is None else tried[option] for option in chosen),
        None if of_all is None else fit(pooled(halves), of_all),
    )
