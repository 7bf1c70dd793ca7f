"""A layer with an integer weight: the result of a PTQ method for each layer."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from calib.errors import UserError
from calib.network.layer_rows import weight_matrix
from calib.quant_model import QuantModel
from calib.quantizer import QParams, channel_qparams, dequantize, fp16_scale, quantize


def augmented_weight(layer: nn.Module) -> Tensor:
    """[W, b] of a Linear or Conv2d, (G, N, K + 1) float64; b = 0 for a layer without bias."""
    weight = weight_matrix(layer)
    bias = getattr(layer, "bias", None)
    bias = weight.new_zeros(weight.shape[:2]) if bias is None else bias.detach().reshape(weight.shape[:2])
    return torch.cat([weight, bias[..., None]], -1).double()


@dataclass(frozen=True)
class RoundedLayer:
    """A layer as `integers` (G, N, K) int8, one scale per output channel in `params`, and `bias` (G, N) float32."""

    integers: Tensor
    params: QParams
    bias: Tensor

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, (G, N, K) float32."""
        return dequantize(self.integers.flatten(0, 1), self.params).reshape(self.integers.shape)

    @property
    def augmented(self) -> Tensor:
        """[weight, bias] (G, N, K + 1) float64."""
        return torch.cat([self.weight, self.bias[..., None]], -1).double()


def rounded_layer(layer: nn.Module, params: QParams | None = None) -> RoundedLayer:
    """`layer` rounded to nearest on the grid `params`; without `params` to 8 bits with max |w| of each channel at 127."""
    weight = weight_matrix(layer)
    params = params or channel_qparams(weight.flatten(0, 1))
    integers = quantize(weight.flatten(0, 1), params).reshape(weight.shape)
    return RoundedLayer(integers, params, augmented_weight(layer)[..., -1].float())


def require_whole_channels(model: QuantModel) -> None:
    """Raise UserError where weights round in groups: a `RoundedLayer` has one scale per output channel."""
    if model.precision.weight_group is not None:
        raise UserError(
            f"[precision] weight_group = {model.precision.weight_group} is for [method] name = 'rtn' without [equalise]: "
            f"all else needs one scale per output channel; leave weight_group out"
        )


def rounded_layers(model: QuantModel) -> dict[str, RoundedLayer]:
    """Return the quantized layers of `model`, their weights on the grids of their `:weight` quantizers.

    Raises UserError where weights round in groups.
    """
    require_whole_channels(model)
    return {
        name: rounded_layer(model.net.get_submodule(name), model.qparams(f"{name}:weight"))
        for name in model.quantized_layers
    }


def with_gain_and_offset(layer: RoundedLayer, gain: Tensor, offset: Tensor) -> RoundedLayer:
    """The layer whose output is gain (W x) + b + offset, with W and b of `layer` and `gain`, `offset` (G, N).

    |gain| multiplies the scales. The scales of an engine are positive, so the sign of a gain goes into the integers, which
    the narrow range allows.
    """
    params = replace(layer.params, scale=fp16_scale(layer.params.scale * gain.abs().flatten()))
    signs = torch.where(gain < 0, -1, 1).to(torch.int8)
    return RoundedLayer(layer.integers * signs[..., None], params, layer.bias + offset.float())


def with_layers(model: QuantModel, layers: Mapping[str, RoundedLayer]) -> QuantModel:
    """A copy of `model` with the weights, biases and `:weight` quantizers of `layers`.

    The weights are on the grids of their quantizers, so that quantizing them again changes nothing. A layer without a
    bias gets one, which costs an engine nothing.
    """
    net = copy.deepcopy(model.net)
    for name, rounded in layers.items():
        layer = net.get_submodule(name)
        weight = layer.get_parameter("weight")
        weight.data = rounded.weight.reshape(weight.shape)
        layer.bias = nn.Parameter(rounded.bias.flatten(), requires_grad=False)
    quantizers = {f"{name}:weight": rounded.params for name, rounded in layers.items()}
    return replace(model, net=net).with_quantizers(quantizers)


def with_biases(net: nn.Module, changes: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `net` with `changes` (layer name -> (out,)) added to the biases; a layer without a bias gets one."""
    net = copy.deepcopy(net)
    for name, change in changes.items():
        layer = net.get_submodule(name)
        bias = getattr(layer, "bias", None)
        layer.bias = nn.Parameter(change if bias is None else bias.detach() + change, requires_grad=False)
    return net
