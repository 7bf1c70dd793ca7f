"""ERQ: ridge regression of a layer's weights against the error of its rounded inputs, then of its rounded weights.

Zhong et al., "ERQ: Error Reduction for Post-Training Quantization of Vision Transformers", ICML 2024. Per layer, with
x~ = [x^, 1] the rounded input, W~ = [W, b] and y = W x + b of the input that is not rounded:

1. Aqer (eq. 8), a ridge regression that compensates for the rounding of the input:
       W~ <- W~ + E[(y - W~ x~) x~^T] H^-1        H = E[x~ x~^T] + ridge I
2. Wqer, the rounding of those weights under the same H: calib/layerwise/erq_rounding.py.

Together they lower E|y - W~^ x~|^2 + ridge |W~^ - W~|^2 over integer weights. The paper has one ridge for all layers; here
each layer takes the one with the least error on images that it was not fitted on, or rounds to nearest. Layers that gain by
themselves can harm the output together, so subsets of them are offered too (calib/layerwise/subsets.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calib.images.batches import Half
from calib.judge.held_out import Candidate, Offer
from calib.layerwise.erq_rounding import round_with_compensation
from calib.layerwise.layer_fits import LayerTrials, best_fit, fitted_layers
from calib.layerwise.layer_sums import LayerSums
from calib.layerwise.subsets import layer_candidates
from calib.network.rounded_layer import RoundedLayer, augmented_weight, rounded_layers
from calib.quant_model import QuantModel
from calib.quantizer import channel_qparams
from calib.store.watch import UNWATCHED, Watch


@dataclass(frozen=True)
class Config:
    """What is tried per layer, and on how much data."""

    ridges: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0)  # damping tried, as fractions of the input's mean square
    rows: int = 32768  # rows of a layer's input over the whole calibration set; fit noise falls with columns / rows

    def __post_init__(self) -> None:
        if not self.ridges or min(self.ridges) <= 0:
            raise ValueError(f"ridges {self.ridges} are not positive numbers")
        if self.rows < 1:
            raise ValueError(f"rows {self.rows} is not a positive number")


def compensated_weight(sums: LayerSums, moment: Tensor) -> Tensor:
    """Return W~ (G, N, D) plus the ridge regression of the error of rounded inputs (Aqer); `moment` is H (G, D, D)."""
    change = torch.cholesky_solve((sums.cross / sums.count).mT, torch.linalg.cholesky(moment)).mT
    return sums.weight + change


def fit(sums: LayerSums, ridge: float, bits: int = 8) -> RoundedLayer:
    """Return the layer after Aqer, then Wqer on the grid of the weights that Aqer found."""
    moment = sums.moment(ridge)
    weight = compensated_weight(sums, moment)
    params = channel_qparams(weight[..., :-1].flatten(0, 1), bits)
    integers, bias = round_with_compensation(weight, params.scale.reshape(weight.shape[:2]), moment, bits)
    return RoundedLayer(integers, params, bias.float())


def candidates(
    model: QuantModel, plain: Candidate, halves: Sequence[Half], config: Config, watch: Watch = UNWATCHED
) -> Offer:
    """Offer `plain` with layers whose weights and biases compensate for the rounding of inputs and weights."""
    rounded = rounded_layers(plain.whole)

    def best(name: str, sums: Sequence[Sequence[LayerSums]]) -> LayerTrials:
        bits = rounded[name].params.bits
        return best_fit(rounded[name], config.ridges, lambda one, ridge: fit(one, ridge, bits), sums)

    def new_sums(name: str) -> LayerSums:
        return LayerSums(augmented_weight(model.net.get_submodule(name)))

    found = fitted_layers(model, halves, config.rows, new_sums, best, watch)
    notes = (f"{len(found.whole)} of {len(model.layers)} layers fitted; the others have less error rounded to nearest",)
    return Offer(layer_candidates(plain, found, halves), notes)
