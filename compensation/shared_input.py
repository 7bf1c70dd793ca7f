"""A branch that reads what a layer of its block reads already: the LayerNorm output, quantized once for both.

    block(x) + LN1(x) W + b        LN1(x) (B, N, C), W (C, C) in INT8

The graph holds a second MatMul behind the QuantizeLinear of `attn.qkv`. The compiler computes both as one INT8 product
C -> 4 C, and bias and sum join the kernel that ends the block: the branch costs no kernel. Two things must hold:

1. the branch has the input scale of `attn.qkv`, so that there is one QuantizeLinear (`share_input`);
2. both products have one tensor-wide scale (`deploy/graph/split_channel_scales.py`), however small W is.
"""

from typing import Any

from torch import Tensor, nn

from calib.quant_model import QuantModel

NORM, READER, BRANCH = "norm1", "attn.qkv", "branch"


def add_branch_on_norm(block: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook: block(x) + branch(norm1(x)). A plain function, so that copies of the block keep working.

    norm1(x) is written twice; the exporter finds that both are one.
    """
    return output + block.branch(block.norm1(inputs[0]))


def attach_to_norm(block: nn.Module, branch: nn.Linear) -> None:
    """Add `branch` (C -> C) of the first LayerNorm's output to what `block` returns (edits `block`)."""
    block.add_module(BRANCH, branch)
    block.register_forward_hook(add_branch_on_norm)


def share_input(model: QuantModel, block: str) -> QuantModel:
    """A copy in which the branch of `block` rounds its input as the block's `attn.qkv` does."""
    return model.with_sites({f"{block}.{BRANCH}:input": model.sites[f"{block}.{READER}:input"]})
