"""Model sizes as the QwT paper counts them, so that our tables can stand beside its.

    bytes = sum over parameters: weight of a quantized layer bits/8, stem and head weight 1, branch weight 2, all else 4

"All else" are biases, norms, tokens, position embeddings and the biases of head and branches; buffers do not count. Files
are smaller (their biases are FP16): report those as well. Only shapes are read, so networks may live on the device "meta".
"""

import re

from torch import nn


def float_bytes(net: nn.Module) -> float:
    """Bytes of `net` with every parameter in float32."""
    return 4.0 * sum(parameter.numel() for parameter in net.parameters())


def model_bytes(net: nn.Module, eight_bit: str, weight_bits: int) -> float:
    """Bytes of the float network `net` once its weights have `weight_bits`.

    The weights of Linear and Conv2d layers whose names match the regular expression `eight_bit` (stem, head) have 8.
    """
    saved = 0.0
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            bits = 8 if re.fullmatch(eight_bit, name) else weight_bits
            saved += layer.weight.numel() * (4 - bits / 8)
    return float_bytes(net) - saved


def branch_bytes(branch: nn.Module) -> float:
    """Bytes of one branch of any form: its weights in FP16, its bias in float32."""
    return sum(value.numel() * (4.0 if name == "bias" else 2.0) for name, value in branch.named_parameters())


def engine_bytes(branch: nn.Module) -> int:
    """Bytes of its numbers in an engine: FP16, or INT8 where they are integers."""
    tensors = [*branch.parameters(), *branch.buffers()]
    return sum(tensor.numel() * (2 if tensor.is_floating_point() else 1) for tensor in tensors)
