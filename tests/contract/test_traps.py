"""Small networks that a careless reading of the graph gets wrong, and images that show it.

The proof on one example does not see all of it: on it a ReLU may be dead, or a softmax nearly uniform.
"""

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from calib.network.fold import fold_affine
from calib.network.qdq import quantized_net
from calib.quant_model import QuantModel
from calib.scales.calibrate import Config as CalibrateConfig
from calib.scales.calibrate import calibrate
from calib.scales.equalise import Config, equalise
from calib.structure.moves import FRONT
from calib.structure.proof import difference, output_of
from deploy.bridge.export import export_pair
from deploy.bridge.parity import compare_with_onnx
from deploy.graph.check import check_strongly_typed
from tests.tiny import half_of, rounded

pytestmark = pytest.mark.slow

W = 16


class Base(nn.Module):
    """A stem, a convolution, `body`, pooling and a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.mid, self.head = nn.Conv2d(3, W, 3, 2, 1), nn.Conv2d(W, W, 3, padding=1), nn.Linear(W, 10)
        self.build()

    def build(self):
        pass

    def forward(self, x):
        return self.head(self.body(self.mid(F.relu(self.stem(x)))).mean((2, 3)))


def tokens(x):
    return x.flatten(2).transpose(1, 2)


def maps(t):
    return t.transpose(1, 2).unflatten(-1, (16, 16))


class ClampedNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).clamp(max=6.0)


class NormThatDoesMore(Base):
    def build(self):
        self.norm = ClampedNorm(W)

    def body(self, x):
        return self.norm(x)


class NormWithAHook(Base):
    def build(self):
        self.norm = nn.BatchNorm2d(W)
        self.norm.register_forward_hook(lambda _m, _x, y: y.clamp(-6, 6))

    def body(self, x):
        return self.norm(x)


class TokensOfTwoLayers(Base):
    def build(self):
        self.a, self.b, self.l = nn.Conv2d(W, W, 1), nn.Conv2d(W, W, 1), nn.Linear(W, W)
        self.a.weight.data.mul_(torch.logspace(-1.5, 1.5, W)[:, None, None, None])

    def body(self, x):
        a, b = F.relu(self.a(x)).flatten(2), F.relu(self.b(x) - 4).flatten(2)  # b is 0 on small images
        return self.l(torch.cat([a, b], 2).transpose(1, 2)).transpose(1, 2).unsqueeze(-1)


class ValueThatIsQueryToo(Base):
    def build(self):
        self.v, self.o = nn.Linear(W, W), nn.Linear(W, W)
        self.v.bias.data.zero_()
        self.mid.bias.data.zero_()

    def body(self, x):
        t = self.v(tokens(x) * 0.05)[:, None]
        return maps(self.o(F.scaled_dot_product_attention(t, t, t)[:, 0]))


class NormOfOneChannel(Base):
    def build(self):
        self.a, self.norm, self.c = nn.Conv2d(W, W, 1), nn.BatchNorm2d(1), nn.Conv2d(W, W, 1)

    def body(self, x):
        y = self.a(x)
        return self.c(F.relu(y[:, 1:] - 1.0).sum(1, keepdim=True) + self.norm(y[:, :1]) + x)


class NormOfHalfTheChannels(Base):
    def build(self):
        self.a, self.norm = nn.Conv2d(W, W, 1), nn.BatchNorm2d(W // 2)

    def body(self, x):
        a, b = self.a(x).chunk(2, 1)
        return torch.cat([self.norm(a), b], 1)


class ViewOfWhatIsEdited(Base):
    def build(self):
        self.z, self.c, self.l = nn.Conv2d(W, W, 1), nn.Conv2d(W, W, 1), nn.Linear(W, W)

    def body(self, x):
        y = x + 0.0
        view = y.permute(0, 2, 3, 1)
        y.mul_(self.z(x))
        return self.c(y) + F.relu(self.l(view) - 2.0).permute(0, 3, 1, 2)


class Encoder(Base):
    def build(self):
        self.encoder = nn.TransformerEncoderLayer(W, 4, 32, batch_first=True)

    def body(self, x):
        return maps(self.encoder(tokens(x)))


class SequenceFirst(Base):
    def build(self):
        self.encoder = nn.TransformerEncoderLayer(W, 4, 32)

    def body(self, x):
        return maps(self.encoder(tokens(x).transpose(0, 1)).transpose(0, 1))


class GroupedQueries(Base):
    def build(self):
        self.q, self.k, self.v, self.o = nn.Linear(W, 16), nn.Linear(W, 8), nn.Linear(W, 8), nn.Linear(16, W)

    def body(self, x):
        t = tokens(x)
        q, k, v = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in (self.q(t), self.k(t), self.v(t)))
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=True)
        return maps(self.o(mixed.transpose(1, 2).flatten(2)))


class ChosenChannels(Base):
    def body(self, x):
        return x[:, x.mean((0, 2, 3)).topk(W).indices]


class NormOfTheBatch(Base):
    def build(self):
        self.norm = nn.GroupNorm(W, W)
        self.other = nn.BatchNorm2d(W, track_running_stats=False)

    def body(self, x):
        return self.other(self.norm(x).mean((2, 3), keepdim=True).expand_as(x)) * 0 + self.norm(x)


class LimitsOfHalfTheChannels(Base):
    def build(self):
        self.a, self.act, self.c = nn.Conv2d(W, W, 1), nn.ReLU6(), nn.Conv2d(W // 2, W, 1)

    def body(self, x):
        a, b = self.a(x).chunk(2, 1)
        return self.c(self.act(a)) + torch.cat([b, b], 1).sigmoid()


class OneLayerTwoNames(Base):
    def build(self):
        self.a = nn.Conv2d(W, W, 1)
        self.b = self.a

    def body(self, x):
        return self.b(x)


class FilledTensor(Base):
    def build(self):
        self.a, self.b, self.c = nn.Conv2d(W, 8, 1), nn.Conv2d(W, 8, 1), nn.Conv2d(16, W, 1)

    def body(self, x):
        out = torch.zeros(x.shape[0], 16, 16, 16)
        out[:, :8] = self.a(x)
        out[:, 8:] = self.b(x)
        return torch.relu(self.c(out))


class PixelsAsVector(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.f, self.g = nn.Conv2d(3, W, 3, 2, 1), nn.Linear(W * 256, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(F.relu(self.g(F.relu(self.f(F.relu(self.c(x)).flatten(1))))))


class Upsampled(Base):
    def build(self):
        self.c = nn.Conv2d(W, W, 3, padding=1)

    def body(self, x):
        return self.c(F.interpolate(x, scale_factor=2, mode="bilinear"))


class NormOfGroups(Base):
    def build(self):
        self.norm, self.c = nn.GroupNorm(4, W), nn.Conv2d(W, W, 1)

    def body(self, x):
        return self.c(F.gelu(self.norm(x)))


class CodeThatReadsALayer(Base):
    def build(self):
        self.l, self.same = nn.Linear(W, W), nn.Conv2d(W, W, 2, padding="same")

    def body(self, x):
        y = maps(self.l(tokens(x).reshape(x.shape[0], -1, self.l.in_features)).to(self.l.weight.dtype))
        return self.same(y) * self.same.kernel_size[0]


ENCODER = tuple(f"encoder.{name}" for name in ("self_attn.qkv", "self_attn.proj", "linear1", "linear2"))
# network -> layers to be quantized beside `mid`; readers whose scales nothing before them may absorb
EXPECTED = {
    NormThatDoesMore: ((), ()),
    NormWithAHook: ((), ()),
    TokensOfTwoLayers: (("a", "b", "l"), ("l",)),
    ValueThatIsQueryToo: (("v", "o"), ("o",)),
    NormOfOneChannel: (("a", "c"), ("c",)),
    NormOfHalfTheChannels: (("a",), ()),
    ViewOfWhatIsEdited: (("z", "c", "l"), ("c", "l")),
    Encoder: (ENCODER, ()),
    SequenceFirst: (ENCODER, ()),
    GroupedQueries: (("q", "k", "v", "o"), ("o",)),
    ChosenChannels: ((), ()),
    NormOfTheBatch: ((), ()),
    LimitsOfHalfTheChannels: (("a", "c"), ("c",)),
    OneLayerTwoNames: (("a",), ()),
    FilledTensor: (("a", "b", "c"), ("c",)),
    PixelsAsVector: (("f", "g"), ("f",)),
    Upsampled: (("c",), ()),
    NormOfGroups: (("c",), ()),
    CodeThatReadsALayer: (("l",), ()),
}


def network(kind):
    torch.manual_seed(1)
    net = kind()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    return net.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", EXPECTED, ids=lambda kind: kind.__name__)
def test_the_function_stays_on_other_images_and_every_layer_is_found(kind):
    net, (layers, closed) = network(kind), EXPECTED[kind]
    model = fold_affine(QuantModel.of("net", net), torch.randn(1, 3, 32, 32))
    assert model.layers == (*(("mid",) if isinstance(net, Base) else ()), *layers)
    absorbed = [
        place for place in model.structure.places if place.kind != FRONT
    ]  # in front of a layer, nothing absorbs it
    assert not {*closed} & {reader for place in absorbed for reader in place.readers}

    halves = [half_of([torch.randn(4, 3, 32, 32) for _ in range(2)]) for _ in range(2)]
    model = equalise(model, halves, Config())
    for size in (1, 30, 300):
        images = size * torch.randn(2, 3, 32, 32)
        assert difference(output_of(net, images), output_of(model.exact_net, images)) < 1e-5

    model = rounded(calibrate(model, halves, CalibrateConfig("max")), halves)
    simulation = quantized_net(model)
    fp16, fp32 = export_pair(simulation, (32, 32))
    assert compare_with_onnx(simulation, fp32, torch.randn(2, 3, 32, 32).numpy()).failure() is None
    assert check_strongly_typed(fp16) == ()
    onnx.checker.check_model(fp16, full_check=True)
