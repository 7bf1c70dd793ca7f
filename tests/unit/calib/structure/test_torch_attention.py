"""torch's own attention with plain layers computes what torch's module computes, whatever it is called with."""

import pytest
import torch
from torch import nn

from calib.network.fold import fold_affine
from calib.quant_model import QuantModel
from calib.structure.torch_attention import SelfAttention, SeparateAttention, plain_attention

B, N, S, C, HEADS = 3, 7, 5, 24, 3


def attention(**options):
    torch.manual_seed(0)
    made = nn.MultiheadAttention(C, HEADS, **options).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        if "bias" in name:
            parameter.normal_()
    return made


def hidden(*shape):
    """Truths, none of whose last rows are all true: torch gives NaN for a query that sees nothing."""
    found = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4
    found[..., 0] = False
    return found


MASKS = {
    "none": {},
    "truths": {"attn_mask": hidden(N, S)},
    "numbers": {"attn_mask": torch.randn(N, S)},
    "of each head": {"attn_mask": hidden(B * HEADS, N, S)},
    "padding": {"key_padding_mask": hidden(B, S)},
    "padding in numbers": {"key_padding_mask": torch.randn(B, S)},
    "both": {"attn_mask": hidden(N, S), "key_padding_mask": hidden(B, S)},
    "both in numbers": {"attn_mask": torch.randn(N, S), "key_padding_mask": torch.randn(B, S)},
    "numbers and padding": {"attn_mask": torch.randn(N, S), "key_padding_mask": hidden(B, S)},
    "truths and padding in numbers": {"attn_mask": hidden(N, S), "key_padding_mask": torch.randn(B, S)},
}


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_over_several_tensors(mask, batch_first):
    theirs = attention(batch_first=batch_first)
    given = [torch.randn(B, N, C), torch.randn(B, S, C), torch.randn(B, S, C)]
    given = given if batch_first else [x.transpose(0, 1) for x in given]
    expected = theirs(*given, need_weights=False, **MASKS[mask])[0]
    found, weights = SeparateAttention(theirs)(*given, need_weights=False, **MASKS[mask])
    torch.testing.assert_close(found, expected)
    assert weights is None


@pytest.mark.parametrize("mask", ["none", "truths", "padding", "both"])
def test_attention_over_one_tensor(mask):
    theirs, x = attention(batch_first=True), torch.randn(B, N, C)
    sizes = {"attn_mask": (N, N), "key_padding_mask": (B, N)}
    masks = {name: hidden(*sizes[name]) for name in MASKS[mask]}
    expected = theirs(x, x, x, need_weights=False, **masks)[0]
    for kind in (SelfAttention, SeparateAttention):
        torch.testing.assert_close(kind(theirs)(x, x, x, **masks)[0], expected)


@pytest.mark.parametrize("options", [{"kdim": 10, "vdim": 14}, {"bias": False}])
def test_keys_of_another_width_and_no_biases(options):
    theirs = attention(batch_first=True, **options)
    given = torch.randn(B, N, C), torch.randn(B, S, options.get("kdim", C)), torch.randn(B, S, options.get("vdim", C))
    torch.testing.assert_close(SeparateAttention(theirs)(*given)[0], theirs(*given, need_weights=False)[0])


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_keys_that_the_module_adds_are_left_to_it(options):
    assert plain_attention(attention(**options), one_tensor=False) is None


class Cross(nn.Module):
    """Tokens attend to themselves, with positions in query and key, then to others."""

    def __init__(self):
        super().__init__()
        self.positions, self.norms = nn.Parameter(torch.randn(1, N, C)), nn.ModuleList(nn.LayerNorm(C) for _ in "ab")
        self.own, self.other, self.memory = attention(batch_first=True), attention(batch_first=True), nn.Linear(C, C)

    def forward(self, x):
        memory = torch.tanh(self.memory(x))
        placed = x + self.positions
        x = self.norms[0](x + self.own(placed, placed, x, need_weights=False)[0])
        return self.norms[1](x + self.other(x, memory, memory, need_weights=False)[0])


def test_cross_attention_is_quantized():
    net, x = Cross().eval().requires_grad_(False), torch.randn(1, N, C)
    model = fold_affine(QuantModel.of("cross", net), x)
    layers = [f"{name}.{layer}" for name in ("own", "other") for layer in ("query", "key", "value", "proj")]
    assert {*model.layers} == {*layers, "memory"}
    pairs = [{"memory", "own.value"}, {"own.query", "own.key"}, {"other.key", "other.value"}]
    assert sorted(map(sorted, model.structure.read_together)) == sorted(map(sorted, pairs))
    torch.testing.assert_close(model.net(x), net(x))


def test_code_that_reads_the_weights_of_attention_keeps_torchs_module():
    class Weights(Cross):
        def forward(self, x):
            memory = torch.tanh(self.memory(x))
            values, weights = self.other(x, memory, memory)
            return self.norms[1](values) + weights.mean()

    net, x = Weights().eval().requires_grad_(False), torch.randn(1, N, C)
    model = fold_affine(QuantModel.of("weights", net), x)
    assert model.layers == ("memory",)
    assert any("other: not made plain, the network's code needs it" in note for note in model.history[-1].notes)
    torch.testing.assert_close(model.net(x), net(x))
