"""Scales do not depend on how the images come: batch size, order, number of them at once.

The statistics themselves are exact: the same tensors in any split and order give the same bits. The forward pass is not:
with one image a CPU convolution takes another algorithm than with several and sums in another order (relative 1e-6), which
moves a few elements into the next histogram bin. A transformer's products do not do this here.
"""

import pytest
import torch

from calib.hooks import input_hooks
from calib.images.batches import Half, Part
from calib.quantizer import QMAX, qparams_from_amax
from calib.scales.calibrate import Config, calibrate, observed_inputs
from calib.statistics.observers import Histogram, amax_from_histogram
from tests.tiny import TINY, tiny_batches, tiny_model

BATCH_SIZES = (1, 8, 64)
QUARTER = 16  # images of one part of one half
CONFIGS = {"max": Config("max"), "percentile": Config("percentile", 99.9), "mse": Config("mse")}
IMAGES = torch.cat(tiny_batches(16, 4))
AS_THEY_COME = list(range(64))
SHUFFLED = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()
FP16_STEP = 2**-10
BIN = 2**-8  # a percentile that falls onto the edge of a bin may take its neighbour
MSE_STEP = 0.011  # of the maximum: of two thresholds with nearly equal error, the next one tried


def scales_from(histograms: dict[str, Histogram], config: Config) -> dict[str, float]:
    """Scale by layer, from statistics as `calibrate` makes it."""
    amax = {name: amax_from_histogram(each, config.observer, config.percentile) for name, each in histograms.items()}
    return {name: float(qparams_from_amax(torch.tensor(value)).scale) for name, value in amax.items()}


def observed(family: str, order: list[int], batch_size: int) -> dict[str, Histogram]:
    model = tiny_model(family)
    with torch.no_grad(), observed_inputs(model.net, model.layers) as histograms:
        for images in IMAGES[order].split(batch_size):
            model.net(images)
    return histograms


def layer_inputs(family: str) -> dict[str, torch.Tensor]:
    """What every layer to be quantized reads, (64, ...)."""
    model = tiny_model(family)
    seen: dict[str, torch.Tensor] = {}
    with torch.no_grad(), input_hooks(model.net, model.layers, lambda *see: seen.update([see[::2]])):
        model.net(IMAGES)
    return seen


@pytest.mark.parametrize("family", sorted(TINY))
def test_the_same_tensors_in_any_split_and_order_give_the_same_bits(family):
    for name, x in layer_inputs(family).items():
        whole = Histogram()
        whole.update(x)
        expected = [scales_from({name: whole}, config) for config in CONFIGS.values()]
        for order, batch_size in zip((AS_THEY_COME, SHUFFLED, SHUFFLED), BATCH_SIZES, strict=True):
            parts = Histogram()
            for part in x[order].split(batch_size):
                parts.update(part)
            assert torch.equal(whole.counts, parts.counts), name
            assert [scales_from({name: parts}, config) for config in CONFIGS.values()] == expected


@pytest.mark.parametrize("observer", CONFIGS)
@pytest.mark.parametrize("batch_size", [1, 8, QUARTER])
def test_a_transformers_scales_are_the_same_bits_for_any_batch_size_and_order(batch_size, observer):
    model, expected = tiny_model("vit"), scales_from(observed("vit", AS_THEY_COME, 8), CONFIGS[observer])
    for order in (AS_THEY_COME, SHUFFLED):
        parts = [Part(part.split(batch_size)) for part in IMAGES[order].split(QUARTER)]
        quantizers = calibrate(model, [Half(tuple(parts[:2])), Half(tuple(parts[2:]))], CONFIGS[observer]).quantizers
        assert {name: float(quantizers[f"{name}:input"].scale) for name in expected} == expected


@pytest.mark.parametrize("family", sorted(set(TINY) - {"vit"}))
def test_a_convolutional_networks_scales_differ_by_rounding_at_most(family):
    reference = observed(family, AS_THEY_COME, 8)
    for order, batch_size in ((AS_THEY_COME, 1), (SHUFFLED, 8), (AS_THEY_COME, 64)):
        found = observed(family, order, batch_size)
        for observer, config in CONFIGS.items():
            expected = scales_from(reference, config)
            for name, scale in scales_from(found, config).items():
                limit = {
                    "max": FP16_STEP * expected[name],
                    "percentile": (FP16_STEP + BIN) * expected[name],
                    "mse": FP16_STEP * expected[name] + MSE_STEP * reference[name].amax / QMAX,
                }[observer]
                assert abs(scale - expected[name]) <= limit, (name, observer, batch_size)
