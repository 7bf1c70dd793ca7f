"""What a fit of a layer's weights has to know about its inputs, as sums that do not grow with the number of images.

With x~ = [x^, 1] (D = K + 1) the rounded input, W~ = [W, b] and r = y - W~ x~ what rounding the input costs, per group:

    square = sum x~ x~^T  (D, D)        cross = sum r x~^T  (N, D)        spent = sum |r|^2

The squared error of any other W~^ follows from them: with d = W~^ - W~ it is spent - 2 <d, cross> + <d square, d>. So what
one half of the images suggests is tried on the sums of the other half. compensation/moments.py is the same for one group,
shifted to the mean; here the weights are damped around zero input, and a depthwise convolution has a thousand groups.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from calib.images.batches import Batches
from calib.network.layer_rows import input_rows
from calib.network.rounded_layer import RoundedLayer
from calib.quant_model import QuantModel


class LayerSums:
    """The sums of one layer, float64, groups first; `weight` is W~ (G, N, D)."""

    def __init__(self, weight: Tensor) -> None:
        groups, outputs, columns = weight.shape
        self.weight = weight
        self.square = weight.new_zeros(groups, columns, columns)
        self.cross = weight.new_zeros(groups, outputs, columns)
        self.spent = 0.0
        self.count = 0

    def update(self, x: Tensor, rounded: Tensor) -> None:
        """Add rows of the layer's input before and after rounding, both (T, G, K)."""
        lost = (x - rounded).transpose(0, 1).double() @ self.weight[..., :-1].mT
        inputs = torch.cat([rounded, torch.ones_like(rounded[..., :1])], -1).transpose(0, 1).double()
        self.square += inputs.mT @ inputs
        self.cross += lost.mT @ inputs
        self.spent += float(lost.square().sum())
        self.count += len(x)

    def merge(self, other: "LayerSums") -> "LayerSums":
        """Return the sums over the rows of both operands."""
        merged = LayerSums(self.weight)
        merged.square, merged.cross = self.square + other.square, self.cross + other.cross
        merged.spent, merged.count = self.spent + other.spent, self.count + other.count
        return merged

    def error(self, found: RoundedLayer) -> float:
        """sum |y - W~^ x~|^2 with the weights of `found`."""
        change = found.augmented - self.weight
        return self.spent + float((change * (change @ self.square - 2 * self.cross)).sum())

    def moment(self, ridge: float) -> Tensor:
        """E[x~ x~^T] + damping I (G, D, D); the damping is `ridge` times the mean of E[x^_k^2] over k, at least 1e-12."""
        moment = self.square / self.count
        diagonal = moment.diagonal(dim1=1, dim2=2)
        damping = (ridge * diagonal[:, :-1].mean(1, keepdim=True)).clamp(min=1e-12)
        return moment + torch.diag_embed(damping.expand_as(diagonal))


def pooled(parts: Sequence[LayerSums]) -> LayerSums:
    """Return the sums over the rows of all `parts`."""
    return functools.reduce(LayerSums.merge, parts)


class Sums(Protocol):
    """Anything that is updated with rows of a layer's input."""

    def update(self, x: Tensor, rounded: Tensor) -> None:
        """Add rows before and after rounding, both (T, G, K)."""


def add_inputs(sums: Mapping[str, Sums], model: QuantModel, batches: Batches, rows: int) -> None:
    """Update `sums` of every layer named in one pass of `model.net` over `batches`, with up to `rows` rows a batch."""
    for x in input_rows(model.net, sums, batches, rows):
        for name, one in sums.items():
            one.update(x[name], model.quantizers[f"{name}:input"].fake_quantize(x[name]))
