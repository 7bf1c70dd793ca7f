"""Matrix products that are written in INT8 instead of FP16, so that fewer bytes move between kernels.

    y = c Q(x^ (t W)) + b        Q rounds the product itself, before its channels get their scales c and the bias

An INT8 product writes FP16 if scales per channel or a bias lie between it and the next quantizer: in a ViT INT8 moves more
bytes than FP16. With Q on the product itself it writes one byte per value, and the kernel behind reads one. Everything else
stays: scales, biases, the number of kernels. In some layers Q costs much accuracy: see calib/layerwise/rounding_points.py.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from torch import nn

from calib.grids import Grid, Unrounded, why_not_int8
from calib.images.batches import Half
from calib.layerwise.rounding_points import Config, RoundingPoints, within_budget
from calib.network.qdq import quantized_net
from calib.quant_model import QuantModel, StageRecord

STAGE = "int8_products"


def linear_layers(model: QuantModel) -> list[str]:
    """Return the quantized linear layers that an engine computes in INT8."""
    return [
        name
        for name in model.quantized_layers
        if isinstance(model.net.get_submodule(name), nn.Linear) and not why_not_int8(model.quantizers[f"{name}:input"])
    ]


def _quantizers(grids: Mapping[str, Grid]) -> dict[str, Grid]:
    return {f"{layer}:output": grid for layer, grid in grids.items()}


def products(model: QuantModel, layers: Sequence[str], halves: Sequence[Half]) -> RoundingPoints:
    """Return what rounding the products of `layers` costs."""
    net = quantized_net(model.with_quantizers(_quantizers(dict.fromkeys(layers, Unrounded()))))
    return RoundingPoints(model, net, {layer: f"{layer}.output" for layer in layers}, halves, _quantizers)


def int8_products(model: QuantModel, halves: Sequence[Half], config: Config) -> QuantModel:
    """Return `model`, all of whose layers are rounded, with products in INT8 where the budget allows it."""
    start = time.perf_counter()
    layers = linear_layers(model)
    if not layers:
        return model.with_record(StageRecord(STAGE, asdict(config), notes=("no linear layer is quantized",)))
    return within_budget(STAGE, "matrix products", config, products(model, layers, halves), halves, start)
