"""Lowered convolutions give what torch gives for the original; what cannot be lowered stays in float with a true reason."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from calib.network.fold import fold_affine
from calib.quant_model import QuantModel

MAPS, SEQUENCE = (1, 16, 9, 11), (1, 16, 13)


class Between(nn.Module):
    """`layer` between a normalisation and another, called `times` in a row."""

    def __init__(self, layer, times=1):
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x):
        x = x - 0.1
        for _ in range(self.times):
            x = self.layer(x)
        return x.sigmoid()


def lowered(layer, size, times=1):
    """(the network, that after folding, an example)."""
    torch.manual_seed(0)
    net, x = Between(layer, times).eval().requires_grad_(False), torch.randn(size)
    return net, fold_affine(QuantModel.of("between", net), x), x


def tried_in_vain(model):
    """Whether the proof had to take a step back."""
    return any("not made plain" in note for note in model.history[-1].notes)


def check(layer, size, quantized, times=1):
    net, model, x = lowered(layer, size, times)
    assert [type(model.net.get_submodule(name)) for name in model.layers] == [nn.Conv2d] * quantized
    torch.testing.assert_close(model.net(x), net(x))
    assert not tried_in_vain(model)
    return model


@pytest.mark.parametrize(("stride", "padding", "dilation", "groups"), [
    *itertools.product((1, 2), (0, 2), (1, 3), (1, 4)), (1, "same", 1, 1), (1, "same", 2, 2), (2, "valid", 1, 1),
])  # fmt: skip
def test_a_convolution_of_a_sequence_is_one_of_maps(stride, padding, dilation, groups):
    layer = nn.Conv1d(16, 24, 4, stride, padding, dilation, groups)
    model = check(layer, SEQUENCE, 1)
    assert model.layers[0].startswith("layer.conv")


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dilation", [1, (2, 1)])
@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), ((3, 2), (0, 1)), (1, 0), ((4, 3), 2)])
def test_a_transposed_convolution_without_stride_is_one_with_the_kernel_turned(kernel, padding, dilation, groups):
    check(nn.ConvTranspose2d(16, 24, kernel, 1, padding, 0, groups, dilation=dilation, bias=groups == 1), MAPS, 1)


@pytest.mark.parametrize(
    "layer",
    [nn.ConvTranspose2d(16, 16, 2, 2), nn.ConvTranspose2d(16, 16, 3, 1, 3), nn.ConvTranspose2d(16, 16, 4, 2, 1)],
    ids=["stride", "cropped", "overlap"],
)
def test_other_transposed_convolutions_stay_in_float_with_the_reason(layer):
    model = check(layer, MAPS, 0)
    assert model.float_layers == {
        "layer": "a transposed convolution: TensorRT-RTX runs it in FP16 even where its input and its weight are INT8"
    }


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_a_border_that_is_not_of_zeros_becomes_a_padding_of_its_own(kind, mode):
    model = check(kind(16, 24, 3, 2, 1, padding_mode=mode), SEQUENCE if kind is nn.Conv1d else MAPS, 1)
    assert any("Pad2d" in type(module).__name__ for module in model.net.modules())


def test_one_layer_that_is_called_twice_is_lowered_once():
    model = check(nn.Conv2d(16, 16, 4, padding="same"), MAPS, 1, times=2)
    assert model.layers == ("layer.1",)


def test_calls_that_differ_are_left_alone():
    class Growing(nn.Conv2d):
        """A convolution that pads more in every call."""

        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(F.pad(x, [self.calls] * 4))

    net = Between(Growing(16, 16, 3), 2).eval()
    net.layer.calls = 0
    x = torch.randn(MAPS)
    model = fold_affine(QuantModel.of("growing", net), x)
    assert model.float_layers == {"layer": "its module computes more than the layer itself"}
    assert not tried_in_vain(model)


@pytest.mark.parametrize(("net", "why"), [
    (nn.Conv1d(6, 6, 3), "6 channels in and 6 out are too few for an INT8 kernel"),
    (nn.Conv3d(16, 16, 1), "the tool writes INT8 for Linear and Conv2d, not for Conv3d"),
    (nn.ConvTranspose1d(16, 16, 2, 2),
     "a transposed convolution: TensorRT-RTX runs it in FP16 even where its input and its weight are INT8"),
])  # fmt: skip
def test_why_layers_of_other_kinds_stay_in_float(net, why):
    size = (1, net.in_channels, *(5, 6, 7)[: net.weight.ndim - 2])
    found = fold_affine(
        QuantModel.of("first", nn.Sequential(nn.Sigmoid(), net, nn.Sigmoid()).eval()), torch.randn(size)
    )
    assert found.float_layers == {"1": why}


def test_a_fixed_filter_is_no_layer():
    class Blur(nn.Module):
        def __init__(self):
            super().__init__()
            self.filter = nn.Buffer(torch.ones(16, 1, 3, 3) / 9)

        def forward(self, x):
            return F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), self.filter, groups=16)

    model = check(nn.Sequential(nn.Conv2d(16, 16, 1), Blur()), MAPS, 1)
    assert model.float_layers == {"layer.1": "its weight is a fixed filter that nothing has learned"}
