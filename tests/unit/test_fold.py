import pytest
import torch
from torch import nn

from calib.fold import conv_norm_pairs, fold_batch_norms, folded_weights
from tests.tiny import TINY, tiny_batches, tiny_model


@pytest.mark.parametrize("conv_bias", [True, False])
@pytest.mark.parametrize("groups", [1, 4])
def test_folded_convolution_equals_convolution_then_norm(conv_bias, groups):
    conv, norm = nn.Conv2d(4, 8, 3, groups=groups, bias=conv_bias).double(), nn.BatchNorm2d(8).double().eval()
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
        tensor.normal_()
    norm.running_var.uniform_(0.1, 3)
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    weight, bias = folded_weights(conv, norm)
    torch.testing.assert_close(
        nn.functional.conv2d(x, weight, bias, groups=groups), norm(conv(x)), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("family", sorted(TINY))
def test_folding_leaves_the_function_unchanged_in_float64(family):
    model = tiny_model(family)
    model.net.double()
    x = tiny_batches(1)[0].double()
    folded = fold_batch_norms(model, x[:1])
    with torch.no_grad():
        torch.testing.assert_close(folded.net(x), model.net(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", sorted(TINY))
def test_no_norm_is_left_and_the_input_model_is_untouched(family):
    model = tiny_model(family)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.net.modules())
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    folded = fold_batch_norms(model, tiny_batches(1)[0][:1])
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.net.modules())
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.net.modules()) == norms
    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())


def test_a_norm_that_reads_no_convolution_stays():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    assert conv_norm_pairs(net, torch.randn(1, 3, 4, 4)) == {}


def test_hooks_are_gone_afterwards():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    assert conv_norm_pairs(net, torch.randn(1, 3, 4, 4)) == {"1": "0"}
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())
