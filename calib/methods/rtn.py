"""Round to nearest: the baseline every other method is compared with.

Each output channel gets the scale that maps its largest weight to 127; nothing else changes.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from calib.batches import Batches
from calib.quant_model import QuantModel, StageRecord
from calib.quantizer import QParams, channel_qparams


@dataclass(frozen=True)
class Config:
    """Round to nearest has no options."""


def weight_sites(model: QuantModel) -> dict[str, QParams]:
    """A `:weight` site for every layer of `model` to be quantized."""
    return {
        f"{name}:weight": channel_qparams(model.net.get_parameter(f"{name}.weight"), model.bits(name).weight)
        for name in model.layers
    }


def reduce_error(model: QuantModel, folds: Sequence[Batches], config: Config) -> QuantModel:  # noqa: ARG001 - the contract
    """`model` with a `:weight` site for every layer to be quantized."""
    start = time.perf_counter()
    sites = weight_sites(model)
    notes = (f"{len(sites)} weights rounded to nearest, one scale per output channel",)
    record = StageRecord("rtn", asdict(config), time.perf_counter() - start, notes=notes)
    return model.with_sites(sites).with_record(record)
