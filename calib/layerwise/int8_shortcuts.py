"""Shortcuts of residual sums in INT8: what a convolutional network passes from block to block.

As its documentation has it, TensorRT computes a convolution, the residual sum behind it and the activation in one kernel
that writes INT8, if the other operand of the sum is INT8 as well; else the sum is a kernel of its own in FP16. So the tensor
that goes around a block gets one quantizer for all its readers: the sum, and the layers that quantize it anyway, which then
read the same integers. What the convolution in front of the sum returns is not rounded. What may round and what it costs:
calib/layerwise/rounding_points.py.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from calib.grids import Grid, Unrounded
from calib.images.batches import Half
from calib.layerwise.rounding_points import Config, RoundingPoints, within_budget
from calib.network.qdq import SHORTCUT, quantized_net
from calib.quant_model import QuantModel, StageRecord

STAGE = "int8_shortcuts"


def shortcuts(model: QuantModel, halves: Sequence[Half]) -> RoundingPoints:
    """Return what rounding the shortcuts of `model` costs."""
    of_structure = model.structure.shortcuts
    quantized = {*model.quantized_layers}

    def quantizers(grids: Mapping[str, Grid]) -> dict[str, Grid]:
        readers = {
            f"{reader}:input": grid
            for name, grid in grids.items()
            for reader in of_structure[name]
            if reader in quantized
        }
        return {f"{name}:shortcut": grid for name, grid in grids.items()} | readers

    net = quantized_net(model.with_quantizers({f"{name}:shortcut": Unrounded() for name in of_structure}))
    points = {name: f"{name}.{SHORTCUT}" for name in of_structure}
    return RoundingPoints(model, net, points, halves, quantizers)


def int8_shortcuts(model: QuantModel, halves: Sequence[Half], config: Config) -> QuantModel:
    """Return `model`, all of whose layers are rounded, with shortcuts in INT8 where the budget allows it."""
    start = time.perf_counter()
    if not model.structure.shortcuts:
        note = "no residual sum behind a quantized convolution"
        return model.with_record(StageRecord(STAGE, asdict(config), notes=(note,)))
    return within_budget(STAGE, "shortcuts", config, shortcuts(model, halves), halves, start)
