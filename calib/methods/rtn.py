"""Round to nearest: the baseline every other method is compared with.

Each output channel gets the scale that maps its largest weight to the largest integer. With `bias_correction` the bias makes
up for what rounding W to W^ does to the mean output (Nagel et al., "Data-Free Quantization Through Weight Equalization and
Bias Correction", ICCV 2019, section 4.2):

    b^ = b + (W - W^) E[x]

The mean is that of inputs which are not rounded. That of rounded ones would mend the mean of clipping too, layer by layer;
MobileNet-v2 loses 8 dB by it.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from torch import Tensor, nn

from calib.images.batches import Batches, spread_images
from calib.judge.held_out import sqnr_db
from calib.network.layer_rows import Means, along_inputs, look_at_inputs
from calib.network.rounded_layer import with_biases
from calib.quant_model import QuantModel, StageRecord
from calib.quantizer import QParams, channel_qparams
from calib.store.watch import UNWATCHED, Watch

IMAGES = 32  # per fold: a mean needs no more
BATCH = 16
JUDGED = 16  # images per fold


@dataclass(frozen=True)
class Config:
    """Whether biases follow the weights."""

    bias_correction: bool = False  # costs an engine nothing


def weight_quantizers(model: QuantModel) -> dict[str, QParams]:
    """A `:weight` quantizer for every layer of `model` to be quantized."""
    return {
        f"{name}:weight": channel_qparams(model.net.get_parameter(f"{name}.weight"), model.bits(name).weight)
        for name in model.layers
    }


def mean_repair(layer: nn.Module, params: QParams, mean: Tensor) -> Tensor:
    """(W - W^) E[x] (out,) of a Linear or Conv2d whose input channels have the `mean` (C,)."""
    weight = layer.get_parameter("weight").detach()
    return ((weight - params.fake_quantize(weight)) * along_inputs(layer, mean)).flatten(1).sum(1)


def mean_inputs(model: QuantModel, folds: Sequence[Batches]) -> list[dict[str, Tensor]]:
    """Mean (C,) of what each layer reads, by fold, then of all folds together."""
    seen = [Means() for _ in folds]
    for batches, means in zip(folds, seen, strict=True):
        look_at_inputs(model.net, model.layers, spread_images(batches, IMAGES).split(BATCH), means)
    whole = functools.reduce(Means.merge, seen)
    return [{name: one.of(name) for name in model.layers} for one in (*seen, whole)]


def with_corrected_biases(model: QuantModel, means: Mapping[str, Tensor]) -> QuantModel:
    """`model`, which has `:weight` quantizers, with biases that make up for rounding at these mean inputs."""
    changes = {
        name: mean_repair(model.net.get_submodule(name), model.qparams(f"{name}:weight"), mean)
        for name, mean in means.items()
    }
    return replace(model, net=with_biases(model.net, changes))


def corrected(model: QuantModel, folds: Sequence[Batches]) -> tuple[QuantModel, float, float]:
    """(model, dB without, dB with): `model`, which has `:weight` quantizers, with corrected biases if that is no worse.

    The mean of one fold is judged by the output on another.
    """
    *parts, whole = (with_corrected_biases(model, means) for means in mean_inputs(model, folds))
    before, after = sqnr_db(folds, [model] * len(folds), parts, images=JUDGED)
    return (whole if after >= before else model), before, after


def nearest(model: QuantModel, folds: Sequence[Batches]) -> QuantModel:
    """`model` rounded to nearest, biases corrected if that serves: what other methods have to be better than."""
    return corrected(model.with_quantizers(weight_quantizers(model)), folds)[0]


def reduce_error(
    model: QuantModel, folds: Sequence[Batches], config: Config, watch: Watch = UNWATCHED,  # noqa: ARG001 - nothing is long here
) -> QuantModel:  # fmt: skip
    """`model` with a `:weight` quantizer for every layer to be quantized."""
    start = time.perf_counter()
    rounded = model.with_quantizers(weight_quantizers(model))
    notes: tuple[str, ...] = (f"{len(model.layers)} weights rounded to nearest, one scale per output channel",)
    before, after = None, None
    if config.bias_correction:
        rounded, before, gained = corrected(rounded, folds)
        note = (
            f"biases make up for its mean: network output {gained:.2f} dB against {before:.2f} dB on other photographs"
        )
        notes += (note if gained >= before else f"dropped: {note}",)
        after = max(before, gained)
    return rounded.with_record(StageRecord("rtn", asdict(config), time.perf_counter() - start, before, after, notes))
