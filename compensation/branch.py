"""The forms a branch may take, as modules: block(x) becomes block(x) + branch(f), f = x (QwT eq. 6) or what a layer reads.

A branch hangs inside its block as `block.branch`, so its nodes in the graph are called `blocks.3.branch/MatMul` and no other
name changes. Its numbers are rounded to FP16 once and for all: the engine multiplies them in FP16, the float32 simulation
holds the same values.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib.modules import returned, with_returned
from calib.network.qdq import QuantLinear, dequantize_weight
from calib.quantizer import QParams, channel_qparams
from compensation.carry import Call, call_of, plus
from compensation.moments import Fit


def fp16_parameter(values: Tensor) -> nn.Parameter:
    """`values` rounded to FP16, in float32."""
    return nn.Parameter(values.half().float().contiguous(), requires_grad=False)


def keep_input(reader: Any, inputs: tuple[Any, ...]) -> None:
    """The hook before a layer whose input a branch shares: it is kept until the block ends."""
    reader.shared_input = inputs[0]


def add_branch(block: Any, inputs: tuple[Any, ...], output: Any) -> Any:
    """The forward hook of a block with a branch. Plain functions, so that copies of the block keep working."""
    if not block.branch.reader:
        return with_returned(output, plus(returned(output), block.branch(inputs[0])))
    reader = block.get_submodule(block.branch.reader)
    shared = reader.shared_input
    del reader.shared_input
    return with_returned(output, plus(returned(output), block.branch(shared)))


class BlockBranch(nn.Module):
    """What all forms share. `fits` says what a branch computes, one affine map per group of channels.

    `reader`: the layer of the block whose input the branch reads; empty: it reads the block's own.
    """

    reader = ""

    def of(self, block: nn.Module, call: Call) -> Tensor:
        """What the branch adds to the output of `block` for `call`; the block runs as far as what the branch reads."""
        if not self.reader:
            return self(call.x)
        return self(call_of(block, self.reader, *call).x)

    def attach(self, block: nn.Module) -> None:
        """Add a copy of this branch to what `block` returns (edits `block`)."""
        block.add_module("branch", copy.deepcopy(self))
        if self.reader:
            block.get_submodule(self.reader).register_forward_pre_hook(keep_input)
        block.register_forward_hook(add_branch)

    def fits(self) -> list[Fit]:
        """The affine maps (d_out, d_in), (d_out,) per group that the branch computes, in float64."""
        raise NotImplementedError


class DenseBranch(BlockBranch):
    """Tokens (B, N, d_in) -> (B, N, d_out), or (B, H, W, d_in) -> (B, H, W, d_out): x W^T + b as a 1x1 convolution.

    A matrix product takes the sum at the end of the block into its kernel and tears that from the LayerNorm behind it: two
    more kernels a block in TensorRT-RTX where a convolution is one (benchmarks/results/branch_forms.json).
    """

    def __init__(self, fit: Fit) -> None:
        super().__init__()
        self.weight = fp16_parameter(fit.weight[:, :, None, None])
        self.bias = fp16_parameter(fit.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, d_in) -> (B, N, d_out), or with H, W instead of N."""
        if x.dim() == 4:
            return F.conv2d(x.permute(0, 3, 1, 2), self.weight, self.bias).permute(0, 2, 3, 1)
        return F.conv2d(x.transpose(1, 2).unsqueeze(3), self.weight, self.bias).squeeze(3).transpose(1, 2)

    def fits(self) -> list[Fit]:
        """One map."""
        return [Fit(self.weight.flatten(1).double(), self.bias.double())]


class SharedBranch(QuantLinear, BlockBranch):
    """block(x) + Q(f) W + b with W in INT8 and f what `reader` reads: a layer beside `attn.qkv` or `mlp.fc1`.

    The compiler computes both as one INT8 product; bias and sum join the kernel that ends the block: the branch costs no
    kernel. Two things must hold: it has the input scale of `reader`, so that there is one QuantizeLinear; both products
    have one tensor-wide scale, however small W is (deploy/graph/split_channel_scales.py).
    """

    def __init__(self, fit: Fit, reader: str, input_params: QParams) -> None:
        d_out, d_in = fit.weight.shape
        linear = nn.Linear(d_in, d_out).requires_grad_(False)
        linear.weight.copy_(fit.weight)
        linear.bias = fp16_parameter(fit.bias)
        super().__init__(linear, input_params, channel_qparams(linear.weight))
        self.reader = reader

    def fits(self) -> list[Fit]:
        """One map, of f rounded: what the integers stand for."""
        weight = dequantize_weight(self.get_buffer("integers"), self.get_buffer("weight_scale"), 1)
        assert self.bias is not None
        return [Fit(weight.t().double(), self.bias.double())]


class ConvBranch(BlockBranch):
    """Maps: a 1x1 convolution (C_out, C_in/groups, 1, 1) with the block's stride."""

    def __init__(self, fits: Sequence[Fit], stride: int) -> None:
        super().__init__()
        self.groups, self.stride = len(fits), stride
        self.weight = fp16_parameter(torch.cat([fit.weight for fit in fits])[:, :, None, None])
        self.bias = fp16_parameter(torch.cat([fit.bias for fit in fits]))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, ceil(H / stride), ceil(W / stride))."""
        return F.conv2d(x, self.weight, self.bias, self.stride, groups=self.groups)

    def fits(self) -> list[Fit]:
        """One map per group."""
        weights = self.weight.double().flatten(1).chunk(self.groups)
        return [Fit(*pair) for pair in zip(weights, self.bias.double().chunk(self.groups), strict=True)]


def engine_bytes(branch: nn.Module) -> int:
    """Return the bytes that the numbers of `branch` take in an engine: FP16, or INT8 where they are integers."""
    tensors = [*branch.parameters(), *branch.buffers()]
    return sum(tensor.numel() * (2 if tensor.is_floating_point() else 1) for tensor in tensors)
