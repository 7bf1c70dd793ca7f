"""Attention at the bits of the recipe's [precision], for comparison with papers: query, key, value and softmax output round.

No engine runs it; INT8 attention that one does run is calib/attention/int8.py. Grids are chosen per tensor on the float
network by the least squared error of the tensor itself, as RepQ-ViT does, from as many images as it takes.
"""

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from calib.attention.int8 import unmodelled
from calib.errors import UserError
from calib.grids import Grid, LogSqrt2, Unrounded, twin_softmax
from calib.hooks import input_hooks
from calib.images.batches import Half, spread_images
from calib.network.qdq import attention_factors
from calib.precision import UNROUNDED, Precision
from calib.quant_model import ATTENTION_ROLES, QuantModel, StageRecord
from calib.quantizer import qparams_from_amax
from calib.statistics.observers import MSE_FRACTIONS
from calib.statistics.signed_ranges import (
    PERCENTILES,
    REPQ,
    SignedHistogram,
    grid_from_histogram,
    least_squares_grid,
    percentile_range,
)

IMAGES = 32  # RepQ-ViT's
BATCH = 8
TWIN_SPLITS = tuple(2.0**-i for i in range(20))  # tried by PTQ4ViT


def factor_grid(role: str, histogram: SignedHistogram, precision: Precision) -> Grid:
    """The grid of one factor of attention; `role` is one of `ATTENTION_ROLES`."""
    bits = precision.inputs
    if bits == UNROUNDED:
        return Unrounded()
    if role == "softmax" and precision.attention == "log_sqrt2":
        return least_squares_grid(histogram, [LogSqrt2(percentile_range(histogram, p)[1], bits) for p in PERCENTILES])
    if role == "softmax" and precision.attention == "twin":
        return least_squares_grid(histogram, [twin_softmax(split, bits) for split in TWIN_SPLITS])
    if precision.zero_points:
        return grid_from_histogram(histogram, REPQ, 0.0, bits)
    thresholds = MSE_FRACTIONS * max(-histogram.low, histogram.high)
    return least_squares_grid(histogram, [qparams_from_amax(amax, bits=bits) for amax in thresholds])


def calibrate_attention(model: QuantModel, halves: Sequence[Half]) -> QuantModel:
    """`model` with quantizers for every attention; there may be none. Raises UserError for one that cannot be simulated."""
    start = time.perf_counter()
    names = model.structure.attentions
    histograms = {f"{name}:{role}": SignedHistogram() for name in names for role in ATTENTION_ROLES}

    def look(name: str, attention: nn.Module, x: Tensor) -> None:
        if reason := unmodelled(attention):
            raise UserError(f"attention '{name}' cannot be simulated: it has {reason}")
        query, key, value = attention_factors(attention, attention.get_submodule("qkv")(x))
        weights = torch.softmax(query @ key.transpose(-2, -1), dim=-1)
        for role, factor in zip(ATTENTION_ROLES, (query, key, weights, value), strict=True):
            histograms[f"{name}:{role}"].update(factor)

    share = math.ceil(IMAGES / len(halves))
    with input_hooks(model.net, names, look), torch.inference_mode():
        for batch in torch.cat([spread_images(half, share) for half in halves]).split(BATCH):
            model.net(batch)
    quantizers = {
        quantizer: factor_grid(quantizer.rpartition(":")[2], histogram, model.precision)
        for quantizer, histogram in histograms.items()
    }
    notes = (f"{len(names)} attentions simulated, softmax output {model.precision.attention}",)
    config = {"attention": model.precision.attention}
    record = StageRecord("simulated attention", config, time.perf_counter() - start, notes=notes)
    return model.with_quantizers(quantizers).with_record(record)
