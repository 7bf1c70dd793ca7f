"""Fitting a network's layers one by one, from sums over their inputs, as many at a time as memory allows."""

from collections.abc import Callable, Iterator, Sequence

from calib.images.batches import Batches
from calib.layerwise.layer_sums import LayerSums, add_inputs
from calib.network.layer_rows import weight_matrix
from calib.network.qdq import quantized_net
from calib.network.rounded_layer import RoundedLayer, augmented_weight, rounded_layer, with_layers
from calib.quant_model import QuantModel
from calib.store.watch import Watch

MEMORY = 4 << 30  # bytes of sums held at a time; more layers take more passes over the images

# (layer rounded to nearest, its sums by fold) -> the layer fitted on each fold, then on all of them; empty to leave it
Fit = Callable[[RoundedLayer, Sequence[LayerSums]], tuple[RoundedLayer, ...]]


def parts(model: QuantModel, folds: int, by_block: bool) -> Iterator[list[str]]:
    """Layers to be quantized that share passes over the images: as many as `MEMORY` allows, within a block if `by_block`."""
    blocks = model.family.blocks(model.net)
    part: list[str] = []
    before, held = "", 0
    for name in model.layers:
        block = next((block for block in blocks if name.startswith(f"{block}.")), name)
        groups, outputs, columns = weight_matrix(model.net.get_submodule(name)).shape
        size = 8 * folds * groups * (columns + 1) * (columns + 1 + outputs)
        if part and (held + size > MEMORY or (by_block and block != before)):
            yield part
            part, held = [], 0
        part.append(name)
        before, held = block, held + size
    yield part


def fitted_layers(
    model: QuantModel,
    plain: QuantModel,
    folds: Sequence[Batches],
    rows: int,
    fit: Fit,
    watch: Watch,
    propagate: bool = False,
) -> list[dict[str, RoundedLayer]]:  # fmt: skip
    """What `fit` finds for each layer of `model`: by fold, then of all folds together.

    `plain`: `model` with `:weight` quantizers, its biases perhaps others. `rows`: of a layer's input, over all images.
    `propagate`: inputs come through the blocks fitted before; two more passes per block.
    """
    share = max(1, rows // sum(len(batches) for batches in folds))
    found: list[dict[str, RoundedLayer]] = [{} for _ in range(len(folds) + 1)]
    rounded: list[str] = []
    done = 0
    for part in parts(model, len(folds), propagate):
        source = None
        if propagate:
            quantizers = {f"{name}:weight": plain.quantizers[f"{name}:weight"] for name in rounded}
            source = quantized_net(with_layers(model.with_quantizers(quantizers), found[-1]))
        sums = [{name: LayerSums(augmented_weight(model.net.get_submodule(name))) for name in part} for _ in folds]
        for of_fold, batches in zip(sums, folds, strict=True):
            add_inputs(of_fold, model, batches, share, source)
        for name in part:
            nearest = rounded_layer(plain.net.get_submodule(name), plain.qparams(f"{name}:weight"))
            if fits := fit(nearest, [of_fold.pop(name) for of_fold in sums]):
                for layers, one in zip(found, fits, strict=True):
                    layers[name] = one
            done += 1
            watch.at(done, len(model.layers))
        rounded += part
    return found
