"""`python -m benchmarks.branch_forms`: the cost of a branch beside every ViT block in an engine, by its form in the graph.

    block(x) + f W + b        x (B, N, C)        f: x itself, LN1(x) or LN2(..), in FP16 or INT8

The kernels of an engine depend on the structure of the graph, not on its numbers, so the network is DINOv2 ViT-S at 224
with random weights. The weights of branches are a hundred times smaller, because their size decides which scales an engine
can share.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from calib.modules import replace_module
from calib.network.qdq import QuantLinear, dequantize_weight
from calib.quantizer import channel_qparams, qparams_from_amax
from compensation.branch import DenseBranch
from compensation.moments import Fit
from deploy import host
from deploy.bridge.export import onnx_from_net
from deploy.engine.audit import audit, planned_layers
from deploy.engine.backends import tensorrt_rtx
from deploy.engine.build import Profile
from deploy.report.evidence import tool_commit

RESULT = Path(__file__).parent / "results" / "branch_forms.json"
COLUMNS = ("form", "kernels", "delta", "int8_gemms", "fp16_gemms", "fp16_convs", "unproven", "fused_attention")
NETWORK, SIZE, SM = "vit_small_patch14_dinov2", 224, 89
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
INPUT = qparams_from_amax(torch.tensor(5.0))  # of every layer; it matters only to branches that share an input


def _linear(n_in: int, n_out: int, size: float = 1.0) -> nn.Linear:
    linear = nn.Linear(n_in, n_out).requires_grad_(False)
    nn.init.normal_(linear.weight, std=0.04 * size)
    return linear


def _int8(linear: nn.Linear) -> QuantLinear:
    return QuantLinear(linear, INPUT, channel_qparams(linear.weight))


def _stacked(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """One Linear whose output is the concatenation of both outputs."""
    both = _linear(first.in_features, first.out_features + second.out_features)
    both.weight.data, both.bias.data = (
        torch.cat([first.weight, second.weight]),
        torch.cat([first.bias, second.bias]),
    )
    return both


class Int8WeightsOnly(nn.Module):
    """A Linear with an FP16 input and a dequantized INT8 weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.held = _int8(linear)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return x @ dequantize_weight(self.held.weight, self.held.weight_scale, 1) + self.held.bias


def _dense(linear: nn.Linear) -> nn.Module:
    return DenseBranch(Fit(linear.weight, linear.bias))


class Diagonal(nn.Module):
    """A factor and an offset per channel."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale, self.bias = linear.weight[0], linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return x * self.scale + self.bias


class BranchBlock(nn.Module):
    """`block` with the output of `branch` added at its end; `reads` names the tensor that the branch reads."""

    def __init__(self, block: Any, reads: str, branch: nn.Module) -> None:
        super().__init__()
        self.block, self.reads, self.branch = block, reads, branch

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        block = self.block
        norm1 = block.norm1(x)
        middle = x + block.ls1(block.attn(norm1))
        norm2 = block.norm2(middle)
        y = middle + block.ls2(block.mlp(norm2))
        return y + self.branch({"x": x, "norm1": norm1, "norm2": norm2}[self.reads])


def _attention(block: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y = nn.functional.scaled_dot_product_attention(q, k, v)  # (B, heads, N, C / heads)
    return block.attn.proj(y.transpose(1, 2).flatten(2))


class PackedQkv(nn.Module):
    """A block with the branch as a fourth part of qkv (C -> 4 C), added at the end."""

    def __init__(self, block: Any, branch: nn.Linear) -> None:
        super().__init__()
        block.attn.qkv = _int8(_stacked(_linear(branch.in_features, 3 * branch.in_features), branch))
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        block, heads = self.block, self.block.attn.num_heads
        parts = block.attn.qkv(block.norm1(x)).unflatten(2, (4, heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v, branch = parts.unbind(0)  # (B, heads, N, C / heads)
        x = x + block.ls1(_attention(block, q, k, v))
        return x + block.ls2(block.mlp(block.norm2(x))) + branch.transpose(1, 2).flatten(2)


class PackedFc1(nn.Module):
    """A block with the branch as a fifth part of fc1 (C -> 5 C), added at the end."""

    def __init__(self, block: Any, branch: nn.Linear) -> None:
        super().__init__()
        block.mlp.fc1 = _int8(_stacked(_linear(branch.in_features, 4 * branch.in_features), branch))
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        block = self.block
        x = x + block.ls1(block.attn(block.norm1(x)))
        parts = block.mlp.fc1(block.norm2(x)).unflatten(2, (5, -1))
        hidden = block.mlp.act(parts[:, :, :4].flatten(2))
        return x + block.ls2(block.mlp.fc2(hidden)) + parts[:, :, 4]


class ConcatProj(nn.Module):
    """A block with the output of LN1 as further inputs of proj (2 C -> C): both have one activation scale."""

    def __init__(self, block: Any, branch: nn.Linear) -> None:
        super().__init__()
        self.both = _int8(_linear(2 * branch.in_features, branch.in_features))
        block.attn.proj = nn.Identity()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        block, heads = self.block, self.block.attn.num_heads
        norm1 = block.norm1(x)
        q, k, v = block.attn.qkv(norm1).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + block.ls1(self.both(torch.cat([_attention(block, q, k, v), norm1], 2)))
        return x + block.ls2(block.mlp(block.norm2(x)))


class SeparateQkv(nn.Module):
    """A block with q, k, v and the branch as four products of the same tensor."""

    def __init__(self, block: Any, branch: nn.Linear) -> None:
        super().__init__()
        width = branch.in_features
        self.q, self.k, self.v = (_int8(_linear(width, width)) for _ in range(3))
        self.branch = _int8(branch)
        block.attn.qkv = nn.Identity()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        block, heads = self.block, self.block.attn.num_heads
        norm1 = block.norm1(x)
        q, k, v = (layer(norm1).unflatten(2, (heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + block.ls1(_attention(block, q, k, v))
        return x + block.ls2(block.mlp(block.norm2(x))) + self.branch(norm1)


@dataclass(frozen=True)
class Form:
    """One form of a branch in the graph.

    `make` turns a block with INT8 layers and a Linear (C -> C) into a block with a branch.
    """

    name: str
    what: str
    make: Callable[[Any, nn.Linear], nn.Module]


def _beside(reads: str, write: Callable[[nn.Linear], nn.Module]) -> Callable[[Any, nn.Linear], nn.Module]:
    return lambda block, linear: BranchBlock(block, reads, write(linear))


def _one_scale(linear: nn.Linear) -> nn.Module:
    return QuantLinear(linear, INPUT, qparams_from_amax(linear.weight.abs().max(), narrow=True))


def _low_rank(linear: nn.Linear) -> nn.Module:
    width = linear.in_features
    return nn.Sequential(_linear(width, width // 8), _linear(width // 8, width))


FORMS = (
    Form("none", "no branch", lambda block, _: block),
    Form("shared_norm1", "INT8 MatMul on the quantized LN1 output, beside qkv", _beside("norm1", _int8)),
    Form("shared_norm2", "INT8 MatMul on the quantized LN2 output, beside fc1", _beside("norm2", _int8)),
    Form("shared_norm1_one_scale", "as shared_norm1, one weight scale of its own", _beside("norm1", _one_scale)),
    Form("packed_qkv", "fourth part of qkv", PackedQkv),
    Form("packed_fc1", "fifth part of fc1", PackedFc1),
    Form("concat_proj", "LN1 output beside the attention output, as inputs of proj", ConcatProj),
    Form("separate_qkv", "four INT8 MatMuls: q, k, v and the branch", SeparateQkv),
    Form("diagonal", "factor and offset per channel of x", _beside("x", Diagonal)),
    Form("dense_fp16", "FP16 MatMul on x", _beside("x", nn.Sequential)),
    Form("dense_fp16_conv", "FP16 1x1 convolution on x", _beside("x", _dense)),
    Form("dense_w8a16", "FP16 MatMul on x, INT8 weights", _beside("x", Int8WeightsOnly)),
    Form("dense_w8a8", "INT8 MatMul on x, quantized for the branch alone", _beside("x", _int8)),
    Form("low_rank", "two FP16 MatMuls on x, rank C / 8", _beside("x", _low_rank)),
)


def network_with(form: Form) -> nn.Module:
    """The ViT with INT8 layers, and a branch of this `form` in every block."""
    torch.manual_seed(0)
    net: Any = timm.create_model(NETWORK, pretrained=False, img_size=SIZE).eval().requires_grad_(False)
    for index, block in enumerate(net.blocks):
        for name in LAYERS:
            layer = block.get_submodule(name)
            replace_module(block, name, _int8(_linear(layer.in_features, layer.out_features)))
        net.blocks[index] = form.make(block, _linear(net.embed_dim, net.embed_dim, size=0.01))
    return net


def measure(form: Form) -> dict[str, Any]:
    """Build an engine with this `form`; the number of its kernels by kind, and its size in bytes."""
    graph = onnx_from_net(network_with(form).half(), torch.zeros(2, 3, SIZE, SIZE).half())
    built = tensorrt_rtx.build(graph, Profile(), (SM,))
    found = audit(built.kernels, planned_layers(graph))
    return {"form": form.name, "what": form.what} | found.to_json() | {"engine_bytes": len(built.plan)}


def main() -> int:
    """Build an engine with every form, write `results/branch_forms.json` and print a table."""
    rows = []
    for form in FORMS:
        print(form.name, file=sys.stderr)
        rows.append(measure(form))
    rows = [row | {"delta": row["kernels"] - rows[0]["kernels"]} for row in rows]
    result = {
        "network": NETWORK, "weights": "random", "size": SIZE, "sm": SM,
        "backend": tensorrt_rtx.NAME, "version": tensorrt_rtx.version(),
        "machine": host.describe(), "commit": tool_commit(), "rows": rows,
        "command": "python -m benchmarks.branch_forms",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    for row in [{name: name for name in COLUMNS}, *rows]:
        print("  ".join(str(row[name]).ljust(22 if name == "form" else len(name)) for name in COLUMNS).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
