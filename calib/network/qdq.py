"""The network as an engine runs it: layers that quantize their inputs and hold integer weights.

`quantized_net` is the only description of the quantization: torch runs it as the simulation, and the exporter turns it
into the ONNX graph. Both are made of the two operators below, which the exporter writes as QuantizeLinear and
DequantizeLinear, so simulation and graph cannot differ in what they round.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib.grids import Grid, gradient_of_clipping, straight_through, why_not_int8
from calib.modules import replace_module
from calib.quant_model import ATTENTION_ROLES, QuantModel
from calib.quantizer import QMAX, QParams, quantize
from calib.structure.in_front import alone, replace_layer
from calib.tensor_scale import tensor_scale


@torch.library.custom_op("int8::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: Tensor) -> Tensor:
    """The fake-quantized `x` (any shape) on the signed 8-bit grid with this `scale` (), in the same shape and dtype."""
    return torch.round(x / scale).clamp_(-QMAX - 1, QMAX).mul_(scale)


@quantize_dequantize.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:  # noqa: ARG001 - the shape depends on x alone
    return torch.empty_like(x)


def _keep_inside(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001 - torch's signature
    x, scale = inputs
    integers = torch.round(x / scale)
    ctx.save_for_backward((integers >= -QMAX - 1) & (integers <= QMAX))  # a byte per element, where x takes four


# The scale has no gradient.
quantize_dequantize.register_autograd(gradient_of_clipping, setup_context=_keep_inside)


@torch.library.custom_op("int8::dequantize_weight", mutates_args=())
def dequantize_weight(q: Tensor, scale: Tensor, axis: int) -> Tensor:
    """The integers `q` (any shape) times `scale`, (C,) along `axis` or (), in the same shape and the dtype of `scale`."""
    shape = [1] * q.ndim
    shape[axis] = -1
    return q.to(scale.dtype) * scale.reshape(shape)


@dequantize_weight.register_fake
def _(q: Tensor, scale: Tensor, axis: int) -> Tensor:  # noqa: ARG001
    return torch.empty_like(q, dtype=scale.dtype)


def tensor_and_channel_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """(t (), c (C,)) with c t == `scales` (C,) and t as of `tensor_scale`.

    deploy/graph/split_channel_scales.py says what a compiler needs t for.
    """
    t = scales.new_tensor(tensor_scale(float(scales.max())))
    return t, scales / t


class QuantLinear(nn.Module):
    """A Linear with integer weights and a quantized input: y = quantize_dequantize(x) dequantize_weight(W) + b.

    `integers` is int8 (in, out), the layout of an ONNX MatMul; `weight_scale` is (out,), `input_scale` ().

    With `output`, the matrix product itself is rounded, before its channels get their scales c (out,) and the bias:
    y = c output(quantize_dequantize(x) (t W)) + b. A compiler then lets the product write INT8. `weight_scale` is t, ().
    """

    def __init__(
        self, linear: nn.Linear, input_params: QParams, weight_params: QParams, output: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("integers", quantize(linear.weight.detach(), weight_params).t().contiguous())
        scale, channel_scale = weight_params.scale.clone(), None
        if output is not None:
            scale, channel_scale = tensor_and_channel_scales(weight_params.scale)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("channel_scale", channel_scale)
        self.register_buffer("input_scale", input_params.scale.clone())
        self.output = output
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features  # which code of networks reads

    @property
    def weight(self) -> Tensor:
        """The dequantized weight (out, in), for code of a network that reads the type of its layers' weights."""
        weight = dequantize_weight(self.integers, self.weight_scale, 1)
        return (weight if self.channel_scale is None else weight * self.channel_scale).t()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = torch.matmul(
            quantize_dequantize(x, self.input_scale), dequantize_weight(self.integers, self.weight_scale, 1)
        )
        if self.output is not None:
            y = self.output(y) * self.channel_scale
        return y if self.bias is None else y + self.bias


class QuantConv2d(nn.Module):
    """A convolution with integer weights and a quantized input.

    `integers` is int8 (out, in / groups, kh, kw); `weight_scale` is (out,), `input_scale` ().
    """

    def __init__(self, conv: nn.Conv2d, input_params: QParams, weight_params: QParams) -> None:
        super().__init__()
        self.register_buffer("integers", quantize(conv.weight.detach(), weight_params))
        self.register_buffer("weight_scale", weight_params.scale.clone())
        self.register_buffer("input_scale", input_params.scale.clone())
        self.bias = conv.bias
        self.stride, self.padding, self.dilation, self.groups = (
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
        )
        self.in_channels, self.out_channels, self.kernel_size = conv.in_channels, conv.out_channels, conv.kernel_size

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, in the shape of the integers, for code of a network that reads its type."""
        return dequantize_weight(self.integers, self.weight_scale, 0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H', W')."""
        x = quantize_dequantize(x, self.input_scale)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Quantizer(nn.Module):
    """A module that quantizes a tensor between layers: ONNX graph, engine and simulation call it by the same name."""

    def __init__(self, params: QParams) -> None:
        super().__init__()
        self.register_buffer("scale", params.scale.clone())

    def forward(self, x: Tensor) -> Tensor:
        """The fake-quantized tensor, in the shape of `x`."""
        return quantize_dequantize(x, self.get_buffer("scale"))


class SimulatedQuantizer(nn.Module):
    """A module that quantizes a tensor to a grid that no engine has. It runs in torch alone and cannot be exported."""

    def __init__(self, quantizer: str, grid: Grid) -> None:
        super().__init__()
        self.quantizer, self.grid = quantizer, grid

    def forward(self, x: Tensor) -> Tensor:
        """The fake-quantized tensor, in the shape of `x`."""
        return straight_through(x, self.grid)


def rounding_module(quantizer: str, grid: Grid) -> nn.Module:
    """The module that quantizes a tensor to `grid`; `quantizer` names it in the message of an export that is refused."""
    return (
        Quantizer(grid) if isinstance(grid, QParams) and not why_not_int8(grid) else SimulatedQuantizer(quantizer, grid)
    )


class SimulatedLayer(nn.Module):
    """A copy of `layer`, with nothing in front, whose weight `rounding` has quantized and whose input `quantizer` does."""

    def __init__(self, layer: nn.Module, quantizer: nn.Module, rounding: nn.Module) -> None:
        super().__init__()
        self.quantizer, self.rounding, self.layer = quantizer, rounding, alone(layer)
        weight = self.layer.get_parameter("weight")
        weight.data = rounding(weight.data)

    def forward(self, x: Tensor) -> Tensor:
        """The output of the layer for the fake-quantized `x`, in the shape of the layer's output."""
        return self.layer(self.quantizer(x))


SHORTCUT = "shortcut_quantizer"  # what the quantizer of a module's output is called within it


def _quantize_output(module: Any, _inputs: Any, output: Tensor) -> Tensor:
    """The forward hook of a module with such a quantizer. A plain function, so that copies of the module keep working."""
    return module.get_submodule(SHORTCUT)(output)


def attention_factors(attention: Any, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(query d^-1/4, key d^-1/4, value), all (B, H, N, d), from the output (B, N, 3 H d) of `attention.qkv`."""
    parts = packed.reshape(*packed.shape[:2], 3, attention.num_heads, attention.head_dim)
    query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
    root = attention.head_dim**-0.25
    return attention.q_norm(query) * root, attention.k_norm(key) * root, value


class QuantAttention(nn.Module):
    """timm's `Attention` over a packed qkv, with quantized query, key, softmax output and value.

    The factor d^-1/2 is split between query and key and applied before they are quantized: TensorRT's fused kernel needs it.
    """

    def __init__(self, attention: Any, quantizers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.qkv, self.q_norm, self.k_norm = attention.qkv, attention.q_norm, attention.k_norm
        self.query, self.key, self.softmax, self.value = (quantizers[role] for role in ATTENTION_ROLES)
        self.proj = attention.proj
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, C) -> (B, N, C). Raises NotImplementedError for a mask: TensorRT has no INT8 attention kernel with one."""
        if attn_mask is not None or is_causal:
            raise NotImplementedError("INT8 attention with a mask")
        query, key, value = attention_factors(self, self.qkv(x))
        # transposed first: ONNX Runtime's optimizer writes an invalid graph for a DequantizeLinear before a Transpose
        scores = self.query(query) @ self.key(key.transpose(-2, -1))
        weights = self.softmax(torch.softmax(scores, dim=-1))
        return self.proj((weights @ self.value(value)).transpose(1, 2).reshape(*x.shape[:2], -1))


def quantized_net(model: QuantModel) -> nn.Module:
    """A copy of `model.net` in eval mode with `model.quantizers` in place and `model.branches` attached.

    Raises TypeError for a quantizer of a layer that is no Linear or Conv2d.
    """
    net = copy.deepcopy(model.net).eval().requires_grad_(False)
    for name in model.quantized_layers:
        layer = net.get_submodule(name)
        quantizer, weight = f"{name}:input", model.quantizers[f"{name}:weight"]
        if why_not_int8(model.quantizers[quantizer]) or not isinstance(weight, QParams):
            read, rounding = (rounding_module(each, model.quantizers[each]) for each in (quantizer, f"{name}:weight"))
            replace_layer(net, name, SimulatedLayer(layer, read, rounding))
        elif isinstance(layer, nn.Linear):
            output = model.quantizers.get(f"{name}:output")
            written = None if output is None else rounding_module(f"{name}:output", output)
            replace_layer(net, name, QuantLinear(layer, model.qparams(quantizer), weight, written))
        elif isinstance(layer, nn.Conv2d):
            replace_layer(net, name, QuantConv2d(layer, model.qparams(quantizer), weight))
        else:
            raise TypeError(f"quantizer '{name}' is a {type(layer).__name__}, not a Linear or Conv2d")
    for name in model.int8_attention:
        roles = {
            role: rounding_module(f"{name}:{role}", model.quantizers[f"{name}:{role}"]) for role in ATTENTION_ROLES
        }
        replace_module(net, name, QuantAttention(net.get_submodule(name), roles))
    for name, branch in model.branches.items():
        branch.attach(net.get_submodule(name))
    for name in model.int8_shortcuts:  # behind the branches, which are part of what a block returns
        module = net.get_submodule(name)
        module.add_module(SHORTCUT, rounding_module(f"{name}:shortcut", model.quantizers[f"{name}:shortcut"]))
        module.register_forward_hook(_quantize_output)
    return net
