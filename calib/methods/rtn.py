"""Round to nearest: the baseline that every other method is compared with.

Each output channel gets the scale that maps its largest weight to the largest integer; where [precision] has a weight_group,
each group of its input channels gets a scale and a zero point. With `bias_correction` the bias makes
up for what rounding W to W^ does to the mean output (Nagel et al., "Data-Free Quantization Through Weight Equalization and
Bias Correction", ICCV 2019, section 4.2):

    b^ = b + (W - W^) E[x]

The mean is that of inputs which are not rounded. With that of rounded inputs the bias would correct the mean of clipping
too, layer by layer; MobileNet-v2 loses 8 dB by it.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from calib.grids import Grid, weight_grid
from calib.images.batches import Half, spread_images
from calib.judge.held_out import Candidate, Offer
from calib.network.layer_rows import Means, look_at_inputs
from calib.network.rounded_layer import with_biases
from calib.quant_model import QuantModel
from calib.store.watch import UNWATCHED, Watch
from calib.structure.moves import along_inputs

IMAGES = 32  # per half: a mean needs no more
BATCH = 16


@dataclass(frozen=True)
class Config:
    """Whether biases follow the weights."""

    bias_correction: bool = False  # costs an engine nothing


def weight_quantizers(model: QuantModel) -> dict[str, Grid]:
    """A `:weight` quantizer for every layer of `model` to be quantized."""
    group = model.precision.weight_group
    return {
        f"{name}:weight": weight_grid(model.net.get_parameter(f"{name}.weight"), model.bits(name).weight, group)
        for name in model.layers
    }


def mean_correction(layer: nn.Module, grid: Grid, mean: Tensor) -> Tensor:
    """(W - W^) E[x] (out,) of a Linear or Conv2d whose input channels have the `mean` (C,)."""
    weight = layer.get_parameter("weight").detach()
    return ((weight - grid.fake_quantize(weight)) * along_inputs(layer, mean)).flatten(1).sum(1)


def mean_inputs(model: QuantModel, halves: Sequence[Half]) -> list[dict[str, Tensor]]:
    """Return the mean (C,) of what each layer reads, by half, then of all images together."""
    seen = [Means() for _ in halves]
    for half, means in zip(halves, seen, strict=True):
        look_at_inputs(model.net, model.layers, spread_images(half, IMAGES).split(BATCH), means)
    whole = functools.reduce(Means.merge, seen)
    return [{name: one.of(name) for name in model.layers} for one in (*seen, whole)]


def with_corrected_biases(model: QuantModel, means: Mapping[str, Tensor]) -> QuantModel:
    """Return `model`, which has `:weight` quantizers, with biases corrected for weight rounding at these mean inputs."""
    changes = {
        name: mean_correction(model.net.get_submodule(name), model.quantizers[f"{name}:weight"], mean)
        for name, mean in means.items()
    }
    return replace(model, net=with_biases(model.net, changes))


def bias_corrected(model: QuantModel, halves: Sequence[Half]) -> Candidate:
    """Return `model`, which has `:weight` quantizers, with corrected biases."""
    *by_half, whole = (with_corrected_biases(model, means) for means in mean_inputs(model, halves))
    return Candidate.unchosen("bias correction", by_half, whole)


def nearest(model: QuantModel) -> Candidate:
    """Return `model` rounded to nearest: what every other candidate is compared with."""
    return Candidate.unfitted("round to nearest", model.with_quantizers(weight_quantizers(model)))


def candidates(
    model: QuantModel, plain: Candidate, halves: Sequence[Half], config: Config, watch: Watch = UNWATCHED,  # noqa: ARG001 - the interface of all methods
) -> Offer:  # fmt: skip
    """Offer corrected biases on top of `plain`, if asked for."""
    return Offer([bias_corrected(plain.whole, halves)] if config.bias_correction else [])
