"""torch's MultiheadAttention over one tensor, with plain layers: qkv and proj, as timm's attention has them."""

from torch import Tensor, nn
from torch.nn import functional as F


class SelfAttention(nn.Module):
    """Computes what `attention`, called with query = key = value, computes; it returns no attention weights.

    torch's TransformerEncoderLayer looks at `in_proj_bias`: None keeps it from going around this module.
    """

    in_proj_bias = None

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        width, biased = attention.embed_dim, attention.in_proj_bias is not None
        self.qkv = nn.Linear(width, 3 * width, biased)
        self.qkv.weight = nn.Parameter(attention.in_proj_weight.detach().clone(), requires_grad=False)
        if biased:
            self.qkv.bias = nn.Parameter(attention.in_proj_bias.detach().clone(), requires_grad=False)
        self.proj = nn.Linear(width, width, attention.out_proj.bias is not None)
        self.proj.load_state_dict(attention.out_proj.state_dict())
        self.proj.requires_grad_(False)
        self.num_heads, self.head_dim = attention.num_heads, width // attention.num_heads
        self.batch_first = attention.batch_first

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
        """(B, N, C), or (N, B, C) if not `batch_first` -> (the same, None). Raises NotImplementedError for padding."""
        if key_padding_mask is not None:
            raise NotImplementedError("attention with a padding mask")
        x = query if self.batch_first else query.transpose(0, 1)
        packed = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, self.head_dim)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        if attn_mask is not None and not attn_mask.is_floating_point():
            attn_mask = attn_mask.logical_not()  # true means masked in MultiheadAttention
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        y = self.proj(mixed.transpose(1, 2).reshape(*x.shape[:2], -1))
        return (y if self.batch_first else y.transpose(0, 1)), None
