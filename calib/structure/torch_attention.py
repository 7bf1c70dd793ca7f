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


def _allowed(mask: Tensor) -> Tensor:
    """What is added to scores as it is; a mask of truths says then what is seen, not what is hidden."""
    return mask if mask.is_floating_point() else mask.logical_not()


def _joined_mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, heads: int) -> Tensor | None:
    """One mask that broadcasts to (B, heads, N, S), of one (N, S) or (B heads, N, S) and one of padding (B, S)."""
    given = []
    if attn_mask is not None:
        given.append(_allowed(attn_mask.unflatten(0, (-1, heads)) if attn_mask.ndim == 3 else attn_mask))
    if key_padding_mask is not None:
        given.append(_allowed(key_padding_mask[:, None, None]))
    if len(given) < 2:
        return given[0] if given else None
    one, other = given
    if one.dtype == other.dtype:
        return one + other if one.is_floating_point() else one & other
    added, seen = (one, other) if one.is_floating_point() else (other, one)
    return added.masked_fill(~seen, -math.inf)


class _PlainAttention(nn.Module):
    in_proj_bias = None

    def __init__(self, attention: nn.MultiheadAttention, **layers: nn.Linear) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.proj = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.num_heads, self.head_dim = attention.num_heads, attention.embed_dim // attention.num_heads
        self.batch_first = attention.batch_first

    def first(self, x: Tensor) -> Tensor:
        """(B, N, C) of what torch's module gets."""
        return x if self.batch_first else x.transpose(0, 1)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
        """What torch's module returns for (B, heads, N, d)."""
        values = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = self.proj(values.transpose(1, 2).flatten(2))
        return (y if self.batch_first else y.transpose(0, 1)), None


class SelfAttention(_PlainAttention):
    """Computes what `attention`, called with query = key = value, computes."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__(attention, qkv=_linear(attention.in_proj_weight, attention.in_proj_bias))

    def forward(
        self,
        query: Tensor,
        key: Tensor,  # noqa: ARG002 - the same as `query`, in the order of torch's module
        value: Tensor,  # noqa: ARG002
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,  # noqa: ARG002 - there are none
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,  # noqa: ARG002
        is_causal: bool = False,  # noqa: ARG002 - a hint beside the mask, which torch wants as well
    ) -> tuple[Tensor, None]:
        """(B, N, C), or (N, B, C) if not `batch_first` -> (the same, None)."""
        x = self.first(query)
        packed = self.get_submodule("qkv")(x).reshape(*x.shape[:2], 3, self.num_heads, self.head_dim)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        return self.mixed(q, k, v, _joined_mask(attn_mask, key_padding_mask, self.num_heads))


class SeparateAttention(_PlainAttention):
    """Computes what `attention` computes, whatever its query, key and value are; it adds no keys of its own."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        apart = (
            attention.q_proj_weight,
            attention.k_proj_weight,
            attention.v_proj_weight,
        )  # None unless the widths differ
        weights = attention.in_proj_weight.chunk(3) if apart[0] is None else apart
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        layers = [_linear(*pair) for pair in zip(weights, biases, strict=True)]
        super().__init__(attention, **dict(zip(("query", "key", "value"), layers, strict=True)))

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
        q, k, v = (
            self.get_submodule(name)(self.first(x)).unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
            for name, x in (("query", query), ("key", key), ("value", value))
        )
        return self.mixed(q, k, v, _joined_mask(attn_mask, key_padding_mask, self.num_heads))


def plain_attention(attention: nn.MultiheadAttention, one_tensor: bool) -> nn.Module | None:
    """Return `attention` with plain layers, for calls over `one_tensor` or any; None if it adds keys of its own."""
    if attention.bias_k is not None or attention.add_zero_attn:
        return None
    return SelfAttention(attention) if one_tensor else SeparateAttention(attention)
