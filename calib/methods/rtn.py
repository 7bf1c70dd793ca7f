"""Round to nearest: the baseline every other method is compared with.

Each output channel gets the scale that maps its largest weight to the largest integer. With `bias_correction` the bias makes
up for what rounding W to W^ does to the mean output (Nagel et al., "Data-Free Quantization Through Weight Equalization and
Bias Correction", ICCV 2019, section 4.2):

    b^ = b + (W - W^) E[x]

The mean is that of inputs which are not rounded. That of rounded ones would mend the mean of clipping too, layer by layer;
MobileNet-v2 loses 8 dB by it.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from calib.batches import Batches, spread_images
from calib.layer_rows import along_inputs, channel_statistics
from calib.quant_model import QuantModel, StageRecord
from calib.quantizer import QParams, channel_qparams
from calib.rounded_layer import with_biases

IMAGES = 32  # per fold: a mean needs no more
BATCH = 16


@dataclass(frozen=True)
class Config:
    """Whether biases follow the weights."""

    bias_correction: bool = False  # costs an engine nothing


def weight_sites(model: QuantModel) -> dict[str, QParams]:
    """A `:weight` site for every layer of `model` to be quantized."""
    return {
        f"{name}:weight": channel_qparams(model.net.get_parameter(f"{name}.weight"), model.bits(name).weight)
        for name in model.layers
    }


def mean_repair(layer: nn.Module, params: QParams, mean: Tensor) -> Tensor:
    """(W - W^) E[x] (out,) of a Linear or Conv2d whose input channels have the `mean` (C,)."""
    weight = layer.get_parameter("weight").detach()
    return ((weight - params.fake_quantize(weight)) * along_inputs(layer, mean)).flatten(1).sum(1)


def with_corrected_biases(model: QuantModel, folds: Sequence[Batches]) -> QuantModel:
    """`model`, which has `:weight` sites, with biases that make up for the mean of their rounding."""
    images = torch.cat([spread_images(batches, IMAGES) for batches in folds])
    seen = channel_statistics(model.net, model.layers, images.split(BATCH))
    changes = {
        name: mean_repair(model.net.get_submodule(name), model.qparams(f"{name}:weight"), seen.mean(name))
        for name in model.layers
    }
    return replace(model, net=with_biases(model.net, changes))


def nearest(model: QuantModel, folds: Sequence[Batches]) -> QuantModel:
    """`model` rounded to nearest, biases corrected: what other methods have to be better than."""
    return with_corrected_biases(model.with_sites(weight_sites(model)), folds)


def reduce_error(model: QuantModel, folds: Sequence[Batches], config: Config) -> QuantModel:
    """`model` with a `:weight` site for every layer to be quantized."""
    start = time.perf_counter()
    rounded = model.with_sites(weight_sites(model))
    notes: tuple[str, ...] = (f"{len(model.layers)} weights rounded to nearest, one scale per output channel",)
    if config.bias_correction:
        rounded = with_corrected_biases(rounded, folds)
        notes += ("biases make up for the mean of it",)
    return rounded.with_record(StageRecord("rtn", asdict(config), time.perf_counter() - start, notes=notes))
