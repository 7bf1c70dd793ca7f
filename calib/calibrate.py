"""Activation scales: one pass of the float network over the calibration images."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from calib.observers import OBSERVERS, Histogram, amax_from_histogram
from calib.quant_model import QuantModel, StageRecord
from calib.quantizer import QParams, qparams_from_amax

Batches = Iterable[Tensor]


@dataclass(frozen=True)
class Config:
    """How an activation histogram becomes a scale."""

    observer: str = "percentile"  # max | percentile | mse
    percentile: float = 0.0  # % of elements not clipped, used by `percentile` only; 0 = the family's

    def __post_init__(self) -> None:
        if self.observer not in OBSERVERS:
            raise ValueError(f"observer '{self.observer}' is not one of {', '.join(OBSERVERS)}")
        if not 0 <= self.percentile <= 100:
            raise ValueError(f"percentile {self.percentile} is not in 0..100")


@contextmanager
def observed_inputs(net: nn.Module, layers: Iterable[str]) -> Iterator[dict[str, Histogram]]:
    """While open, every forward pass of `net` adds the inputs of `layers` to the histograms yielded."""
    histograms = {name: Histogram() for name in layers}

    def observe(name: str) -> Callable:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            histograms[name].update(inputs[0])

        return hook

    hooks = [net.get_submodule(name).register_forward_pre_hook(observe(name)) for name in histograms]
    try:
        yield histograms
    finally:
        for hook in hooks:
            hook.remove()


def qparams_from_histogram(histogram: Histogram, config: Config) -> QParams:
    """Tensor-wide parameters of an activation."""
    amax = amax_from_histogram(histogram, config.observer, config.percentile)
    return qparams_from_amax(torch.tensor(amax))


def calibrate(model: QuantModel, batches: Batches, config: Config) -> QuantModel:
    """`model` with an `:input` site for every layer to be quantized, from `batches` of (B, 3, H, W) float32."""
    start = time.perf_counter()
    config = replace(config, percentile=config.percentile or model.family.percentile)
    with observed_inputs(model.net, model.family.layers(model.net)) as histograms, torch.inference_mode():
        for batch in batches:
            model.net(batch)
    sites = {f"{name}:input": qparams_from_histogram(h, config) for name, h in histograms.items()}
    notes = (f"{len(sites)} activation scales by '{config.observer}'",)
    record = StageRecord("calibrate", asdict(config), time.perf_counter() - start, notes=notes)
    return model.with_sites(sites).with_record(record)
