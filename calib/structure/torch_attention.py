"""torch's MultiheadAttention with plain layers: qkv and proj over one tensor, else query, key, value and proj.

Both return no attention weights. torch's TransformerEncoderLayer looks at `in_proj_bias`: None keeps it from going around
the module.
"""

import math

from torch import Tensor, nn
from torch.nn import functional as F


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer


def _seen(mask: Tensor) -> Tensor:
    """A mask as scaled_dot_product_attention reads it: truths say what is seen, where torch's module has what is hidden."""
    return mask if mask.is_floating_point() else mask.logical_not()


def _joined_mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, heads: int) -> Tensor | None:
    """One mask that broadcasts to (B, heads, N, S), of one (N, S) or (B heads, N, S) and one of padding (B, S)."""
    given = []
    if attn_mask is not None:
        given.append(_seen(attn_mask.unflatten(0, (-1, heads)) if attn_mask.ndim == 3 else attn_mask))
    if key_padding_mask is not None:
        given.append(_seen(key_padding_mask[:, None, None]))
    if len(given) < 2:
        return given[0] if given else None
    one, other = given
    if one.dtype == other.dtype:
        return one + other if one.is_floating_point() else one & other
    added, seen = (one, other) if one.is_floating_point() else (other, one)
    return added.masked_fill(~seen, -math.inf)


class _PlainAttention(nn.Module):
    """What both have in common: torch's arguments, the attention itself, and its last layer."""

    in_proj_bias = None

    def __init__(self, attention: nn.MultiheadAttention, **layers: nn.Linear) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.proj = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.num_heads, self.head_dim = attention.num_heads, attention.embed_dim // attention.num_heads
        self.batch_first = attention.batch_first

    def projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Return q (B, heads, N, d), k and v (B, heads, S, d) of (B, N, C), (B, S, C') and (B, S, C'')."""
        raise NotImplementedError

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,  # noqa: ARG002 - there are none
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,  # noqa: ARG002
        is_causal: bool = False,  # noqa: ARG002 - a hint beside the mask, which torch wants as well
    ) -> tuple[Tensor, None]:
        """(B, N, C), (B, S, C'), (B, S, C''), or with the first two axes swapped if not `batch_first` -> (B, N, C), None."""
        given = (x if self.batch_first else x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self.projected(*given)
        values = F.scaled_dot_product_attention(
            q, k, v, attn_mask=_joined_mask(attn_mask, key_padding_mask, self.num_heads)
        )
        y = self.proj(values.transpose(1, 2).flatten(2))
        return (y if self.batch_first else y.transpose(0, 1)), None


class SelfAttention(_PlainAttention):
    """Computes what `attention`, called with query = key = value, computes."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__(attention, qkv=_linear(attention.in_proj_weight, attention.in_proj_bias))

    def projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG002 - all are one
        """Return q, k and v of what all three are."""
        packed = self.get_submodule("qkv")(query).reshape(*query.shape[:2], 3, self.num_heads, self.head_dim)
        return packed.permute(2, 0, 3, 1, 4).unbind(0)


class SeparateAttention(_PlainAttention):
    """Computes what `attention` computes, whatever its query, key and value are; it adds no keys of its own."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        # each is None unless keys or values have another width
        apart = attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
        weights = attention.in_proj_weight.chunk(3) if apart[0] is None else apart
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        layers = [_linear(*pair) for pair in zip(weights, biases, strict=True)]
        super().__init__(attention, **dict(zip(("query", "key", "value"), layers, strict=True)))

    def projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Return what the layers of the same names make of each."""
        return tuple(
            self.get_submodule(name)(x).unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
            for name, x in (("query", query), ("key", key), ("value", value))
        )


def plain_attention(attention: nn.MultiheadAttention, one_tensor: bool) -> nn.Module | None:
    """Return `attention` with plain layers, for calls over `one_tensor` or any; None if it adds keys of its own."""
    if attention.bias_k is not None or attention.add_zero_attn:
        return None
    return SelfAttention(attention) if one_tensor else SeparateAttention(attention)
