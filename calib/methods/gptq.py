"""GPTQ: column by column to the grid, each column's error absorbed by those not rounded yet.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023. Per layer
and row w of its weight, with H = E[x^ x^T] + damping of the rounded input x^, columns j in order (eq. 2 and 3 with a fixed
order):

    q_j = Q(w_j)        w_F <- w_F - (w_j - q_j) / [H_F^-1]_jj [H_F^-1]_jF        F: j and the columns after it

The row j of H_F^-1, over the root of its diagonal, is row j of the upper Cholesky factor U of H^-1 (section 3.3, step 3), so
nothing is inverted on the way: w_F <- w_F - e_j U_jF with e_j = (w_j - q_j) / U_jj. Columns beyond a block of 128 are
updated once per block (step 2). The grid is the one of rounding to nearest and biases stay, as in the paper. A layer rounds
to nearest where that has less error on images it was not fitted on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calib.images.batches import Half
from calib.judge.held_out import Candidate, Offer
from calib.layerwise.layer_fits import LayerTrials, best_fit, fitted_layers
from calib.layerwise.layer_sums import LayerSums
from calib.layerwise.subsets import layer_candidates
from calib.network.rounded_layer import RoundedLayer, augmented_weight, rounded_layers
from calib.quant_model import QuantModel
from calib.quantizer import QParams
from calib.store.watch import UNWATCHED, Watch

BLOCK = 128  # columns


@dataclass(frozen=True)
class Config:
    """The paper's damping, and on how much data H is measured."""

    damping: float = 0.01  # as a fraction of the input's mean square
    rows: int = 32768  # rows of a layer's input over the whole calibration set

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise ValueError(f"damping {self.damping} is not a positive number")
        if self.rows < 1:
            raise ValueError(f"rows {self.rows} is not a positive number")


def round_by_columns(weight: Tensor, scale: Tensor, moment: Tensor, low: int, high: int) -> Tensor:
    """Integers (G, N, K) as int8 in low .. high of `weight` (G, N, K) on the grids `scale` (G, N).

    `moment` H (G, K, K) is positive definite; computed in its dtype.
    """
    weight, scale = weight.to(moment.dtype, copy=True), scale.to(moment.dtype)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moment)), upper=True)
    integers = torch.empty_like(weight)
    columns = weight.shape[2]
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = weight.new_zeros(*weight.shape[:2], stop - start)
        for j in range(start, stop):
            integers[..., j] = torch.round(weight[..., j] / scale).clamp(low, high)
            error = (weight[..., j] - integers[..., j] * scale) / upper[:, None, j, j]
            weight[..., j:stop] -= error[..., None] * upper[:, None, j, j:stop]
            errors[..., j - start] = error
        weight[..., stop:] -= errors @ upper[:, start:stop, stop:]
    return integers.to(torch.int8)


def fit(sums: LayerSums, params: QParams, damping: float) -> RoundedLayer:
    """The layer on the grid `params`, its bias as it was."""
    weight, moment = sums.weight[..., :-1], sums.moment(damping)[:, :-1, :-1]
    integers = round_by_columns(weight, params.scale.reshape(weight.shape[:2]), moment, params.low, params.high)
    return RoundedLayer(integers, params, sums.weight[..., -1].float())


def candidates(
    model: QuantModel, plain: Candidate, halves: Sequence[Half], config: Config, watch: Watch = UNWATCHED
) -> Offer:
    """Offer `plain` with layers whose rounding errors cancel as far as their columns allow."""
    rounded = rounded_layers(plain.whole)

    def best(name: str, sums: Sequence[Sequence[LayerSums]]) -> LayerTrials:
        params = rounded[name].params
        return best_fit(rounded[name], (config.damping,), lambda one, value: fit(one, params, value), sums)

    def new_sums(name: str) -> LayerSums:
        return LayerSums(augmented_weight(model.net.get_submodule(name)))

    found = fitted_layers(model, halves, config.rows, new_sums, best, watch)
    notes = (f"{len(found.whole)} of {len(model.layers)} weights rounded column by column, the others to nearest",)
    return Offer(layer_candidates(plain, found, halves), notes)
