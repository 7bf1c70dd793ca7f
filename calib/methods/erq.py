"""ERQ: weights that expect rounded inputs, rounded so that they repair each other.

Zhong et al., "ERQ: Error Reduction for Post-Training Quantization of Vision Transformers", ICML 2024. Per layer, with
x~ = [x^, 1] the rounded input, W~ = [W, b] and y = W x + b of the input that is not rounded:

1. Aqer (eq. 8), a ridge regression that makes up for the rounding of the input:
       W~ <- W~ + E[(y - W~ x~) x~^T] H^-1        H = E[x~ x~^T] + ridge I
2. Wqer, the rounding of those weights under the same H: calib/layerwise/erq_rounding.py.

Together they lower E|y - W~^ x~|^2 + ridge |W~^ - W~|^2 over integer weights. The paper has one ridge for all layers; here
each layer takes the one that serves it best across photographs, or rounds to nearest, and the whole is dropped if the
network's output on other photographs says so.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from calib.images.batches import Batches
from calib.judge.held_out import adopt_if_better
from calib.layerwise.erq_rounding import round_with_compensation
from calib.layerwise.layer_fits import fitted_layers
from calib.layerwise.layer_sums import LayerSums, error_across, pooled
from calib.methods.rtn import nearest
from calib.network.rounded_layer import RoundedLayer
from calib.quant_model import QuantModel, StageRecord
from calib.quantizer import channel_qparams
from calib.store.watch import UNWATCHED, Watch


@dataclass(frozen=True)
class Config:
    """What is tried per layer, and on how much data."""

    ridges: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0)  # damping tried, as fractions of the input's mean square
    rows: int = 32768  # rows of a layer's input over the whole calibration set; fit noise falls with columns / rows
    propagate: bool = False  # fit each block to inputs that come through rounded blocks; two more passes per block

    def __post_init__(self) -> None:
        if not self.ridges or min(self.ridges) <= 0:
            raise ValueError(f"ridges {self.ridges} are not positive numbers")
        if self.rows < 1:
            raise ValueError(f"rows {self.rows} is not a positive number")


def make_up_for_inputs(sums: LayerSums, moment: Tensor) -> Tensor:
    """Aqer: W~ (G, N, D) plus the ridge regression of what rounding the input costs; `moment` is H (G, D, D)."""
    change = torch.cholesky_solve((sums.cross / sums.count).mT, torch.linalg.cholesky(moment)).mT
    return sums.weight + change


def fit(sums: LayerSums, ridge: float, bits: int = 8) -> RoundedLayer:
    """Aqer, then Wqer on the grid of the weights Aqer found."""
    moment = sums.moment(ridge)
    weight = make_up_for_inputs(sums, moment)
    params = channel_qparams(weight[..., :-1].flatten(0, 1), bits)
    integers, bias = round_with_compensation(weight, params.scale.reshape(weight.shape[:2]), moment, bits)
    return RoundedLayer(integers, params, bias.float())


def best_fits(plain: RoundedLayer, folds: Sequence[LayerSums], config: Config) -> tuple[RoundedLayer, ...]:
    """The layer fitted on each fold, then on all of them; empty if no ridge beats `plain` across folds."""
    bits = plain.params.bits
    tried = {ridge: [fit(sums, ridge, bits) for sums in folds] for ridge in config.ridges}
    errors = {ridge: error_across(found, folds) for ridge, found in tried.items()}
    ridge = min(errors, key=lambda ridge: errors[ridge])
    if errors[ridge] >= error_across([plain] * len(folds), folds):
        return ()
    return (*tried[ridge], fit(pooled(folds), ridge, bits))


def reduce_error(model: QuantModel, folds: Sequence[Batches], config: Config, watch: Watch = UNWATCHED) -> QuantModel:
    """`model` with weights and biases that make up for the rounding of inputs and weights.

    `folds` are parts of the calibration set without a common photograph; what one suggests is judged on another.
    """
    start = time.perf_counter()
    plain = nearest(model, folds)
    found = fitted_layers(
        model, plain, folds, config.rows, lambda layer, sums: best_fits(layer, sums, config), watch, config.propagate
    )
    adopted, before, after, note = adopt_if_better(plain, found, folds)
    notes = (f"{len(found[-1])} of {len(model.layers)} layers fitted, the others round to nearest: less error", note)
    record = StageRecord("erq", asdict(config), time.perf_counter() - start, before, after, notes)
    return adopted.with_record(record)
