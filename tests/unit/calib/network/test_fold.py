import pytest
import torch
from timm.layers import LayerScale
from torch import nn

from calib.network.fold import affine_pairs, fold_affine, fold_into, gain_and_offset
from calib.quant_model import QuantModel
from calib.structure.trace import Trace
from tests.tiny import TINY, tiny_batches, tiny_model


@pytest.mark.parametrize("conv_bias", [True, False])
@pytest.mark.parametrize("groups", [1, 4])
def test_folded_convolution_equals_convolution_then_norm(conv_bias, groups):
    conv, norm = nn.Conv2d(4, 8, 3, groups=groups, bias=conv_bias).double(), nn.BatchNorm2d(8).double().eval()
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
        tensor.normal_()
    norm.running_var.uniform_(0.1, 3)
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    expected = norm(conv(x))
    fold_into(conv, *gain_and_offset(norm))
    torch.testing.assert_close(conv(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", sorted(TINY))
def test_folding_leaves_the_function_unchanged_in_float64(family):
    model = tiny_model(family)
    model.net.double()
    x = tiny_batches(1)[0].double()
    folded = fold_affine(model, x[:1])
    with torch.no_grad():
        torch.testing.assert_close(folded.net(x), model.net(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", sorted(TINY))
def test_no_norm_is_left_and_the_input_model_is_untouched(family):
    model = tiny_model(family)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.net.modules())
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    folded = fold_affine(model, tiny_batches(1)[0][:1])
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.net.modules())
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.net.modules()) == norms
    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())


def test_a_norm_that_reads_no_convolution_stays():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    assert affine_pairs(Trace(net, torch.randn(1, 3, 4, 4))) == {}


class TwoReaders(nn.Module):
    """A convolution whose output is read before and behind its norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.conv(x)
        return self.norm(x) + x


class TwoNorms(nn.Module):
    """A convolution that is called twice, with a norm of its own each time."""

    def __init__(self):
        super().__init__()
        self.conv, self.one, self.other = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.one(self.conv(x)) + self.other(self.conv(x.flip(-1)))


def uneven(net):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.1, 3)
    return net.eval()


def test_a_norm_behind_a_convolution_is_folded_into_it():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    assert affine_pairs(Trace(net, torch.randn(1, 3, 4, 4))) == {"1": "0"}


@pytest.mark.parametrize("kind", [TwoReaders, TwoNorms])
def test_a_convolution_with_another_reader_keeps_its_norm(kind):
    net, x = uneven(kind()), torch.randn(2, 3, 4, 4)
    model = fold_affine(QuantModel.of("tiny", net), x[:1])
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.net.modules()) == len(net._modules) - 1
    torch.testing.assert_close(model.net(x), net(x))


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_scale_becomes_part_of_the_layer_it_follows(bias):
    net = nn.Sequential(nn.Linear(6, 5, bias=bias), nn.Dropout(), LayerScale(5)).double().eval()
    net[2].gamma.data.normal_()
    x = torch.randn(7, 6, dtype=torch.float64)
    expected = net[2].gamma * (x @ net[0].weight.T + (net[0].bias if bias else 0))
    model = QuantModel.of("tiny", net)
    folded = fold_affine(model, x[:1])
    assert not any(isinstance(module, LayerScale) for module in folded.net.modules())
    assert folded.history[-1].notes[0] == "1 of 1 LayerScales folded"
    torch.testing.assert_close(folded.net(x), expected, rtol=1e-12, atol=1e-12)
    assert isinstance(net[2], LayerScale)


def test_a_layer_scale_stays_where_the_folded_weights_would_have_no_fp16_scale():
    net = nn.Sequential(nn.Linear(6, 5), LayerScale(5, init_values=1e-6)).eval()
    model = QuantModel.of("tiny", net)
    assert isinstance(fold_affine(model, torch.randn(1, 6)).net[1], LayerScale)
    net[1].gamma.data[2] = 0.5  # beside this row the others do not count
    assert not isinstance(fold_affine(model, torch.randn(1, 6)).net[1], LayerScale)
