"""What a trace tells of many families of networks, against a second, simpler way to find the same."""

import copy
import dataclasses
import itertools
import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from calib.errors import UserError
from calib.hooks import input_hooks
from calib.input_rows import join_inputs
from calib.inputs import Input, Inputs
from calib.network.fold import fold_affine
from calib.quant_model import QuantModel
from calib.structure.moves import FRONT, INSERT, LAYER, NORM, move
from calib.structure.proof import MAX_REL_L2, difference, output_of
from calib.structure.structure import structure_of
from deploy.report.structure import structure_lines
from tests.families import FAMILIES, OwnNetwork, family_net

FOLDED = {}


def folded(family):
    """(the float network, the model after folding, an example), made once per family."""
    if family not in FOLDED:
        net, x = family_net(family)
        FOLDED[family] = net, fold_affine(QuantModel.of(family, net), x[:1]), x
    return FOLDED[family]


# family -> (quantized layers, blocks, places by kind: norm, layer, insertion, front; attentions that can be INT8)
EXPECTED = {
    "vit": (8, 2, (4, 2, 2, 0), 2),
    "deit distilled": (8, 2, (4, 2, 2, 0), 2),
    "eva02": (8, 2, (4, 4, 0, 0), 0),
    "dinov3": (8, 2, (4, 2, 2, 0), 0),
    "clip image tower": (8, 2, (4, 2, 0, 2), 2),  # QuickGELU is two operators: its scales lie in front of fc2
    "siglip": (12, 2, (6, 3, 3, 0), 2),  # 4 layers of the attention that pools
    "beit": (8, 2, (4, 2, 2, 0), 0),
    "swin": (17, 4, (9, 4, 4, 0), 0),
    "swin v2": (17, 4, (0, 4, 4, 9), 0),
    "convnext": (30, 9, (12, 0, 9, 0), 0),
    "resnet": (13, 4, (0, 7, 0, 0), 0),
    "mobilenet v3": (33, 12, (0, 6, 9, 0), 0),
    "efficientnet, same padding": (12, 5, (0, 4, 4, 0), 0),
    "regnet y": (19, 5, (0, 11, 0, 0), 0),
    "nfnet": (24, 4, (0, 0, 15, 0), 0),
    "mixer": (8, 2, (2, 0, 4, 2), 0),
    "levit": (15, 3, (0, 0, 8, 7), 0),
    "sam 2": (23, 5, (10, 5, 5, 0), 0),
    "hiera": (23, 5, (10, 5, 5, 0), 0),
    "own module": (8, 2, (2, 3, 0, 0), 0),
    "chain": (3, 3, (0, 3, 0, 0), 0),
    "pyramid": (6, 4, (0, 1, 0, 1), 0),
    "odd layers": (4, 4, (0, 2, 0, 0), 0),
}


WHY_FLOAT = {  # family -> how the reason begins
    "eva02": "something other than a norm lies between", "dinov3": "something other than a norm lies between",
    "beit": "it has a mask", "swin": "its code multiplies query and key itself",
    "levit": "its code multiplies query and key itself", "hiera": "its module has no q_norm, k_norm, num_heads",
}  # fmt: skip


@pytest.mark.parametrize("family", WHY_FLOAT)
def test_attentions_that_stay_in_float_are_told_with_the_reason(family):
    structure = folded(family)[1].structure
    assert structure.float_attentions
    assert all(why.startswith(WHY_FLOAT[family]) for why in structure.float_attentions.values())
    (line,) = (line for line in structure_lines(structure) if "attentions in FP16" in line)
    assert line.startswith(f"attentions in FP16 ({len(structure.float_attentions)}): {WHY_FLOAT[family]}")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_structure_is_what_a_reader_of_the_network_expects(family):
    _, model, _ = folded(family)
    found = model.structure
    kinds = tuple(sum(place.kind == kind for place in found.places) for kind in (NORM, LAYER, INSERT, FRONT))
    assert (len(model.layers), len(found.blocks), kinds, len(found.attentions)) == EXPECTED[family]
    assert found.refused == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_float_and_folded_are_the_same_function(family):
    net, model, x = folded(family)
    assert difference(output_of(net, x), output_of(model.net, x)) < 1e-5
    with torch.no_grad():
        assert float((net(x) - net(x.flip(0))).norm() / net(x).norm()) > 1e-3  # else nothing above says anything


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_and_convolution_is_quantized_or_has_a_reason(family):
    _, model, _ = folded(family)
    modules = {name for name, m in model.net.named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)}
    called = set()
    handles = [
        model.net.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name)) for name in modules
    ]
    with torch.no_grad():
        model.net(family_net(family)[1][:1])
    for handle in handles:
        handle.remove()
    assert called - {*model.structure.unknown} == {*model.layers} | ({*model.float_layers} & modules) - {
        *model.structure.unknown
    }
    assert len(model.layers) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_scales_far_from_one_can_move_at_all_places_together(family):
    _, model, x = folded(family)
    exact = output_of(model.net, x)

    def moved(net):
        for index, place in enumerate(model.structure.places):
            generator = torch.Generator().manual_seed(index)
            scale = torch.exp2(torch.rand(len(place.rows), generator=generator).double() * 6 - 3)
            move(net, place, scale, torch.full_like(scale, 0.3 * place.shifts))

    assert difference(exact, output_of(model.net, x, moved)) < 1e-9


def test_a_wrong_scale_is_larger_than_the_limit_of_the_proof():
    _, model, x = folded("vit")
    place = next(place for place in model.structure.places if place.kind == NORM)
    half = dataclasses.replace(place, readers=())
    exact = output_of(model.net, x)
    scale = torch.full((len(place.rows),), 1.25, dtype=torch.float64)
    apart = difference(exact, output_of(model.net, x, lambda net: move(net, half, scale, torch.zeros_like(scale))))
    assert apart > 10 * MAX_REL_L2


class Toy(nn.Module):
    """Two layers, with `between` in between."""

    def __init__(self, between, first=None, second=None):
        super().__init__()
        self.first = first or nn.Linear(12, 16)
        self.second = second or nn.Linear(16, 10)
        self.between = between

    def forward(self, x):
        return self.second(self.between(self.first(x)))


def places_of_toy(between, x=None, **layers):
    torch.manual_seed(0)
    net = Toy(between, **layers).eval()
    example = torch.randn(1, 5, 12) if x is None else x
    net = nn.Sequential(nn.LayerNorm(12), net, nn.LayerNorm(10)) if x is None else net
    return structure_of(net.requires_grad_(False), example).places


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("between", "reads"),
    [
        (nn.ReLU(), True),
        (nn.LeakyReLU(0.1), True),
        (nn.Identity(), True),
        (Call(lambda x: x * 0.5), True),
        (Call(lambda x: x.transpose(1, 2).flip(1).transpose(1, 2)), True),  # channels in another order
        (Call(lambda x: x.unflatten(-1, (4, 4)).transpose(-1, -2).flatten(-2)), True),  # shuffled channels
        (Call(F.gelu), False),
        (Call(lambda x: x + 1), False),
        (Call(lambda x: x * x), False),
        (Call(lambda x: torch.sigmoid(x) * x), False),
        (Call(lambda x: x.softmax(-1)), False),
        (Call(lambda x: x.cumsum(-1)), False),
        (Call(lambda x: x.roll(1, dims=1)), True),  # positions in another order
        (Call(lambda x: x[..., :8].repeat(1, 1, 2)), False),  # one channel read as two
        (Call(lambda x: F.pad(x[..., :15], (0, 1), value=1.0)), False),
    ],
    ids=str,
)
def test_scales_move_between_two_layers_exactly_where_the_operator_between_allows_it(between, reads):
    found = [place for place in places_of_toy(between) if place.kind == LAYER and place.readers == ("1.second",)]
    assert bool(found) == reads


def test_every_reader_of_a_norm_gets_the_scale_or_has_it_in_front_beside_a_shortcut():
    class Readers(nn.Module):
        def __init__(self, shortcut):
            super().__init__()
            self.norm, self.one, self.two = nn.LayerNorm(12), nn.Linear(12, 12), nn.Linear(12, 12)
            self.end, self.shortcut = nn.LayerNorm(12), shortcut

        def forward(self, x):
            x = self.norm(x)
            return self.end(self.one(x) + self.two(x) + (x if self.shortcut else 0))

    for shortcut, kind in ((False, NORM), (True, FRONT)):
        found = structure_of(Readers(shortcut).eval(), torch.randn(1, 5, 12))
        (place,) = found.places
        assert (place.kind, place.producer, place.readers, place.shifts) == (kind, "norm", ("one", "two"), True)
        assert found.read_together == (("one", "two"),)


def test_a_shift_does_not_move_where_a_convolution_pads_with_zeros():
    class Maps(nn.Module):
        def __init__(self, padding):
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 16, 3), nn.ReLU6()
            self.next, self.norm = nn.Conv2d(16, 16, 3, padding=padding), nn.GroupNorm(2, 16)

        def forward(self, x):
            return self.norm(self.next(self.act(self.conv(x))))

    for padding in (0, 1):
        (place,) = structure_of(Maps(padding).eval(), torch.randn(1, 3, 12, 12)).places
        assert (place.limits, place.shifts) == (("act",), padding == 0)


def test_layers_that_cannot_be_rounded_alone_stay_in_float_with_the_reason():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.twice = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding=1)
            self.up, self.fourth = nn.ConvTranspose2d(16, 16, 2, 2), nn.Conv2d(16, 16, 1)
            self.table, self.positions = nn.Linear(2, 16), nn.Buffer(torch.randn(1, 2))
            self.tied, self.last = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 3, 1)

        def forward(self, x):
            x = self.twice(torch.relu(self.twice(self.first(x))))
            x = self.up(x) + self.table(self.positions)[..., None, None]
            x = F.conv2d(self.fourth(x), self.tied.weight + 1)
            return self.last(x)

    found = QuantModel.of("odd", Odd().eval(), structure_of(Odd().eval(), torch.randn(1, 3, 12, 12)))
    reasons = {name: reason.split(":")[0] for name, reason in found.float_layers.items()}
    assert reasons == {
        "first": "the first layer",
        "up": "a transposed convolution",
        "last": "the last layer",
        "table": "it reads constants only",
        "": "its weight is computed in the forward pass",
    }
    assert found.layers == ("twice", "fourth")


class Called(nn.Module):
    """A layer that is called twice, behind a GELU each time or once, and at the end or not."""

    def __init__(self, before, end):
        super().__init__()
        self.first, self.twice, self.other, self.end, self.before = *(nn.Linear(16, 16) for _ in "abc"), end, before

    def forward(self, x):
        x = self.twice(F.gelu(self.first(x)))
        return self.end(self.twice(self.before(self.other(x))))


def test_a_layer_at_two_places_is_one_layer():
    _, model, _ = folded("pyramid")
    assert {*model.float_layers} == {"stem", "head"}
    assert "mix.0" in model.layers


def test_a_layer_that_is_called_several_times_is_what_it_is_in_all_calls():
    for before, end in itertools.product((nn.GELU(), nn.ReLU()), (nn.Identity(), nn.Sigmoid())):
        found = structure_of(Called(before, end).eval(), torch.randn(1, 5, 16))
        assert ("twice" in found.after_gelu) == isinstance(before, nn.GELU)
        last = "the last layer: its error goes straight into the output" if isinstance(end, nn.Identity) else None
        assert found.why_float("twice") == last
        assert found.why_float("other") is None


def test_a_network_that_cannot_be_traced_is_refused_in_one_line():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(UserError, match=r"Branching cannot be traced by torch\.export") as caught:
        structure_of(Branching(), torch.randn(1, 3, 8, 8))
    assert "\n" not in str(caught.value)


def test_weights_that_a_module_computes_or_pads_itself_become_plain_layers():
    for family, kind in (("nfnet", nn.Conv2d), ("efficientnet, same padding", nn.Sequential), ("beit", nn.Linear)):
        net, model, _ = folded(family)
        changed = [
            name
            for name, module in model.net.named_modules()
            if type(module) is kind and name in dict(net.named_modules()) and type(net.get_submodule(name)) is not kind
        ]
        biased = [name for name in model.layers if family == "beit" and name.endswith("qkv")]
        assert changed or biased
        assert any("made plain" in note for note in model.history[-1].notes)


def test_the_own_module_has_its_gate_in_float_and_its_halves_scaled():
    net, x = OwnNetwork().eval().requires_grad_(False), torch.randn(1, 3, 32, 32)
    model = fold_affine(QuantModel.of("own", net), x)
    by_producer = {place.producer: place for place in model.structure.places}
    assert by_producer["blocks.0.norm"].readers == ("blocks.0.gate", "blocks.0.up")
    assert by_producer["blocks.0.up"].readers == ("blocks.0.down",)
    assert "blocks.0.gate" not in by_producer
    assert math.isclose(sum(map(len, (model.layers, model.float_layers))), 10)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", [None, "causal", "float"])
def test_torchs_own_attention_over_one_tensor_becomes_plain_layers(batch_first, mask):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(24)
            self.attention = nn.MultiheadAttention(24, 3, batch_first=batch_first)
            self.end = nn.LayerNorm(24)
            hidden = torch.ones(7, 7).triu(1).bool()
            self.mask = None if mask is None else nn.Buffer(hidden if mask == "causal" else torch.randn(7, 7))

        def forward(self, x):
            y = self.norm(x)
            return self.end(x + self.attention(y, y, y, need_weights=False, attn_mask=self.mask)[0])

    torch.manual_seed(0)
    net, x = Encoder().eval().requires_grad_(False), torch.randn(1, 7, 24) if batch_first else torch.randn(7, 1, 24)
    net.attention.in_proj_bias.normal_()
    model = fold_affine(QuantModel.of("encoder", net), x)
    assert model.layers == ("attention.qkv", "attention.proj")
    assert {place.readers for place in model.structure.places} == {("attention.qkv",), ("attention.proj",)}
    torch.testing.assert_close(model.net(x), net(x))


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0"])
def test_branches_of_training_become_one_convolution(name):
    torch.manual_seed(0)
    net, x = timm.create_model(name, num_classes=10).eval().requires_grad_(False), torch.randn(1, 3, 32, 32)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    model = fold_affine(QuantModel.of(name, net), x)
    assert "parallel branches merged by re-parameterisation" in model.history[-1].notes
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.net.modules())
    assert model.structure.places
    assert difference(output_of(net, x), output_of(model.net, x)) < 1e-5


def test_an_attention_that_lacks_what_an_int8_one_takes_from_it_says_what():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj, self.num_heads, self.head_dim = nn.Linear(16, 48), nn.Linear(16, 16), 2, 8

        def forward(self, x):
            q, k, v = self.qkv(x).reshape(x.shape[0], -1, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
            return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    net = nn.Sequential(nn.LayerNorm(16), Attention(), nn.LayerNorm(16)).eval()
    (why,) = structure_of(net, torch.randn(1, 5, 16)).float_attentions.values()
    assert why == "its module has no q_norm, k_norm, which an INT8 attention takes from it as from timm's Attention"


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_layer_with_hooks_of_its_own_stays_in_float(register):
    net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))).eval()
    getattr(net[1], register)(lambda *_: None)
    found = structure_of(net, torch.randn(1, 5, 16))
    assert found.why_float("0") is None
    assert found.why_float("1") == "it has hooks of its own, which an INT8 layer in its place would not run"


class Scaled(nn.Linear):
    """A layer of a user's own with another argument."""

    def forward(self, x, scale=None):
        assert scale == 2
        return super().forward(x)


class CalledUnusually(nn.Module):
    """Layers that are called by keyword, with two arguments, and as usual."""

    def __init__(self):
        super().__init__()
        self.norm, self.usual, self.named = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.scaled, self.before, self.head = Scaled(16, 16), nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x):
        x = self.before(x)
        x = self.norm(x)
        x = self.usual(x) + self.named(input=x)
        return self.head(self.scaled(x.relu(), 2.0))


def test_a_layer_that_is_called_unlike_torchs_own_stays_float_and_the_others_are_rounded():
    net, x = CalledUnusually().eval(), torch.randn(64, 4, 16)
    structure = structure_of(net, x[:1])
    floats = [name for name in ("usual", "named", "scaled") if "other arguments" in str(structure.why_float(name))]
    assert floats == ["named", "scaled"]
    model = fold_affine(QuantModel.of("own", net), x[:1])
    read = []
    with input_hooks(model.net, ("named", "usual"), lambda name, _layer, given: read.append((name, given.shape))):
        model.net(x)
    assert read == [("usual", x.shape), ("named", x.shape)]
    with input_hooks(model.net, ("named",), lambda _name, _layer, given: given * 0), torch.no_grad():
        changed = model.net(x)
    assert not torch.equal(changed, net(x))


class ProductsWithParameters(nn.Module):
    """Matrices that are parameters of the network itself, as those of CLIP's projections."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(16, 16), nn.Linear(16, 8)
        self.first, self.second, self.third = (nn.Parameter(torch.randn(16, 16)) for _ in range(3))
        self.gain = nn.Parameter(torch.ones(16))

    def forward(self, x):
        x = torch.einsum("bnc,cd->bnd", self.layer(x), self.first) * self.gain
        x = F.linear(x @ (self.second * 2), self.first)
        return self.head(F.linear(x, self.third))


def test_products_with_parameters_are_told_each():
    structure = structure_of(ProductsWithParameters().eval(), torch.randn(1, 4, 16))
    assert list(structure.unknown) == ["first", "", "third"], "by the parameter, but for one that is computed"
    assert all("a product with a parameter" in why for why in structure.unknown.values())
    assert "in float (3): a product with a parameter" in "\n".join(structure_lines(structure))


class Unread(nn.Module):
    """A head for training whose result nobody reads when the network answers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.auxiliary, self.head = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x):
        x = self.second(self.first(x).relu()).relu()
        self.auxiliary(x).relu()
        return self.head(x.mean(1))


def test_what_no_output_is_computed_from_is_no_layer_and_reads_nothing():
    structure = structure_of(Unread().eval(), torch.randn(1, 4, 16))
    assert [*structure.layers] == ["first", "second", "head"]
    assert {reader for place in structure.places for reader in place.readers} <= {*structure.layers}


class TiedTransposed(nn.Module):
    """A weight that the network's own code reads again, as a tied decoder does."""

    def __init__(self, transposed):
        super().__init__()
        self.transposed = transposed
        self.first, self.tied, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x):
        x = self.tied(self.first(x).relu()).relu()
        return self.head(F.linear(x, self.tied.weight.t() if self.transposed else self.tied.weight))


@pytest.mark.parametrize("transposed", [True, False])
def test_a_layer_whose_weight_other_code_reads_is_not_rounded(transposed):
    structure = structure_of(TiedTransposed(transposed).eval(), torch.randn(1, 4, 16))
    assert "its weight is also read in the network's own code" in structure.layers["tied"].why_float
    assert not structure.layers["tied"].roundable
    assert structure.layers["first"].why_float is None


class Casts(nn.Module):
    """A network in several types."""

    def __init__(self, kind, inside):
        super().__init__()
        self.kind, self.first, self.second = kind, nn.Linear(16, 16), nn.Linear(16, 8)
        if inside:
            self.first.to(kind)

    def forward(self, x):
        return self.second(self.first(x.to(self.kind)).float())


@pytest.mark.parametrize("inside", [True, False])
def test_a_network_that_casts_in_its_forward_pass_is_told_so(inside):
    with pytest.raises(UserError, match=r"^Casts c[^\n]*take casts to half or double out of its forward pass$"):
        structure_of(Casts(torch.float16, inside).eval(), torch.randn(1, 4, 16))


def test_a_refused_move_is_told_like_any_other():
    structure = structure_of(PostNorm().eval(), torch.randn(1, 4, 16))
    front = next(place for place in structure.places if place.kind == FRONT)
    lines = [*structure_lines(dataclasses.replace(structure, places=(), refused=((front, 0.5),)))]
    assert f"not moved, a trial changed the output by 5.0e-01: in front of {' & '.join(front.readers)}" in lines


class PostNorm(nn.Module):
    """A norm whose output the residual sum reads as well as a layer, within a network without further modules."""

    def __init__(self):
        super().__init__()
        self.before, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)
        self.layer, self.head = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x):
        x = self.norm(self.before(x))
        return self.head(x + self.layer(x).relu())


def test_a_scale_in_front_of_a_layer_is_told_apart_from_one_that_is_absorbed():
    lines = "\n".join(structure_lines(structure_of(PostNorm().eval(), torch.randn(1, 4, 16))))
    assert "in front of layer" in lines
    assert "-> layer" not in lines


class Conditioned(nn.Module):
    """Tokens that a vector scales and shifts; the vector comes out too where `returned`."""

    def __init__(self, returned):
        super().__init__()
        self.returned = returned
        self.embed, self.modulate, self.add = nn.Linear(16, 24), nn.Linear(24, 32), nn.Linear(24, 16)
        self.first, self.second, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, tokens, vector):
        vector = F.silu(self.embed(vector))
        scale, shift = self.modulate(vector).chunk(2, 1)
        x = self.first(tokens) * (1 + scale[:, None]) + shift[:, None]
        x = self.head(F.relu(self.second(x) + self.add(vector)[:, None]))
        return (x, vector) if self.returned else x


@pytest.mark.parametrize("tokens", [6, 1])
@pytest.mark.parametrize("returned", [False, True])
def test_layers_of_a_vector_that_scales_and_shifts_all_tokens_stay_in_float(tokens, returned):
    net = Conditioned(returned).eval()
    join_inputs(net, Inputs((Input("tokens", "float32", (tokens, 16)), Input("vector", "float32", (16,)))))
    found = structure_of(net, torch.randn(1, tokens * 16 + 16))
    floats = {name for name, layer in found.layers.items() if "scales or shifts all others" in str(layer.why_float)}
    expected = {"modulate", "add"} | (set() if returned else {"embed"})
    assert floats == (expected if tokens > 1 else set()), "a vector that scales one token is as large as the token"
    assert {"first", "second"} <= {name for name, layer in found.layers.items() if layer.why_float is None}
    assert all(found.layers[name].roundable for name in floats)


class Step(nn.Module):
    """One token of a text at a time: a norm without means, as RMSNorm, and a half of the channels."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x):
        x = self.first(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))
        return self.head(F.relu(self.second(x[..., :16] * x[..., 16:])))


def test_a_network_that_computes_one_position_is_not_taken_for_what_follows_pooling():
    found = structure_of(Step().eval(), torch.randn(1, 1, 16))
    assert {name for name, layer in found.layers.items() if layer.why_float is None} == {"first", "second"}


class Cache(nn.Module):
    """Values that the network returns and reads itself, behind those of earlier steps, and logits."""

    def __init__(self):
        super().__init__()
        self.values, self.mix, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x):
        values = self.values(x)
        return self.head(F.relu(self.mix(F.relu(torch.cat([x, values], 1))))), values.transpose(1, 2)


def test_what_is_returned_and_read_inside_comes_from_no_last_layer():
    found = structure_of(Cache().eval(), torch.randn(1, 4, 16))
    assert {name for name, layer in found.layers.items() if layer.why_float is None} == {"values", "mix"}
    assert found.why_float("head") == "the last layer: its error goes straight into the output"
    assert not any(place.producer == "values" for place in found.places), "a scale there would reach the output"


class Recurrent(nn.Module):
    """A recurrent layer between two others."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(8, 16), kind(16, 16, batch_first=True), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.inner(self.first(x))[0][:, -1])


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_a_recurrent_layer_is_told_with_the_reason(kind):
    found = structure_of(Recurrent(kind).eval(), torch.rand(2, 6, 8))
    assert found.unknown == {"inner": "a recurrent layer: the tool quantizes Linear and convolution modules"}


class Dense(nn.Module):
    """Convolutions that read what several before them return, side by side; `last` reads the sum of two."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.grow, self.mix = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.inner, self.last = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.first(x)
        y = torch.cat([x, F.leaky_relu(self.grow(x), 0.2)], 1)
        z = torch.cat([y, F.silu(self.mix(y))], 1)
        return self.last(x + self.inner(z))


def test_a_convolution_behind_a_concatenation_has_scales_in_front():
    torch.manual_seed(0)
    net, x = Dense().eval(), torch.rand(2, 3, 12, 10)
    places = {place.readers: place for place in structure_of(net, x).places}
    assert places.keys() == {("mix",), ("inner",)}
    moved = copy.deepcopy(net)
    for (reader,), place in places.items():
        channels = getattr(net, reader).in_channels
        assert (place.kind, place.rows, place.shifts, place.axis) == (FRONT, tuple(range(channels)), False, -3)
        move(moved, place, torch.logspace(-2, 2, channels), torch.zeros(channels))
    seen = {}
    with torch.no_grad(), input_hooks(moved, ["mix"], lambda name, _layer, found: seen.update({name: found})):
        assert difference(moved(x), net(x)) < MAX_REL_L2
        first = net.first(x)
    torch.testing.assert_close(seen["mix"][:, 0], first[:, 0] * 100, rtol=1e-4, atol=1e-4)
