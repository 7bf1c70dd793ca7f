"""Whether changed weights serve the network's output on photographs they were not fitted on.

A layer's own error is a poor judge of that: in a transformer a few huge activations decide it.
"""

from collections.abc import Mapping, Sequence

import torch

from calib.batches import Batches, spread_images
from calib.decibels import decibels
from calib.qdq import quantized_net
from calib.quant_model import QuantModel
from calib.rounded_layer import RoundedLayer, with_layers

JUDGED = 64  # images per fold
BATCH = 16
MARGIN_DB = 0.1  # a smaller gain is chance


def sqnr_db(folds: Sequence[Batches], *candidates: Sequence[QuantModel], images: int = JUDGED) -> list[float]:
    """Output SQNR (dB) of each candidate over all folds; fold i - 1 runs through its i-th model, fitted on fold i.

    The candidates are repairs of one network: its float outputs are computed once for all. `images` of each fold are taken.
    """
    signal, noise = 0.0, [0.0] * len(candidates)
    for index, models in enumerate(zip(*candidates, strict=True)):
        nets = [quantized_net(model) for model in models]
        with torch.inference_mode():
            for batch in spread_images(folds[index - 1], images).split(BATCH):
                exact = models[0].float_net(batch).double()
                signal += float(exact.square().sum())
                for which, net in enumerate(nets):
                    noise[which] += float((net(batch) - exact).square().sum())
    return [decibels(signal, each) for each in noise]


def adopt_if_better(
    plain: QuantModel, found: Sequence[Mapping[str, RoundedLayer]], folds: Sequence[Batches]
) -> tuple[QuantModel, float, float, str]:
    """(model, dB before, dB after, what happened): `plain`, or with the last of `found` put in if that is better.

    `found` holds layers fitted on each of `folds`, then on all of them; the former decide, each on another fold. The last
    must not be worse on the images it was fitted on, either: that the parts gained is no promise for the whole.
    """
    *parts, whole = (with_layers(plain, layers) for layers in found)
    unchanged = [plain] * len(folds)
    before, after, fitted = sqnr_db(folds, unchanged, parts, [whole] * len(folds))
    note = f"network output {after:.2f} dB against {before:.2f} dB on other photographs"
    if after < before + MARGIN_DB:
        return plain, before, before, f"dropped: {note}"
    if fitted < before:
        return plain, before, before, f"dropped: {note}, but fitted on all of them {fitted:.2f} dB"
    return whole, before, after, note
