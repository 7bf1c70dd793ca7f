"""Whether changed weights serve the network's output on photographs they were not fitted on.

A layer's own error is a poor judge of that: in a transformer a few huge activations decide it.
"""

import math
from collections.abc import Mapping, Sequence

import torch

from calib.calibrate import Batches, spread_images
from calib.qdq import quantized_net
from calib.quant_model import QuantModel
from calib.rounded_layer import RoundedLayer, with_layers

JUDGED = 64  # images per fold
BATCH = 16
MARGIN_DB = 0.1  # a smaller gain is chance


def sqnr_db(models: Sequence[QuantModel], folds: Sequence[Batches]) -> float:
    """Output SQNR (dB) over all folds; fold i - 1 runs through `models[i]`, which was fitted on fold i."""
    signal = noise = 0.0
    for index, model in enumerate(models):
        net = quantized_net(model)
        with torch.inference_mode():
            for images in spread_images(folds[index - 1], JUDGED).split(BATCH):
                exact = model.float_net(images).double()
                signal += float(exact.square().sum())
                noise += float((net(images) - exact).square().sum())
    return 10 * math.log10(signal / noise) if signal and noise else math.inf


def adopt_if_better(
    plain: QuantModel, found: Sequence[Mapping[str, RoundedLayer]], folds: Sequence[Batches]
) -> tuple[QuantModel, float, float, str]:
    """(model, dB before, dB after, what happened): `plain`, or with the last of `found` put in if that is better.

    `found` holds layers fitted on each of `folds`, then on all of them; the former decide, each on another fold.
    """
    before = sqnr_db([plain] * len(folds), folds)
    after = sqnr_db([with_layers(plain, layers) for layers in found[:-1]], folds)
    note = f"network output {after:.2f} dB against {before:.2f} dB on other photographs"
    if after < before + MARGIN_DB:
        return plain, before, before, f"dropped: {note}"
    return with_layers(plain, found[-1]), before, after, note
