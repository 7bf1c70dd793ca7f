import pytest
import timm
from torch import nn

from calib.errors import UserError
from calib.families import families, family_of
from calib.quant_model import QuantModel
from tests.tiny import TINY, tiny_net


def test_every_family_has_a_tiny_network_to_test_it_with():
    assert set(families()) == set(TINY)


@pytest.mark.parametrize("family", sorted(TINY))
def test_every_linear_and_conv_is_quantized_or_has_a_reason(family):
    net, described = tiny_net(family), families()[family]
    layers = {name for name, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    floats = {name for name in layers if described.float_reason(name)}
    assert set(QuantModel.of(described.name, net, described).layers) | floats == layers
    assert 0 < len(floats) < len(layers)
    assert described.blocks(net)


def test_a_network_of_no_family_is_refused_by_class_name():
    with pytest.raises(UserError, match="unsupported architecture: SwinTransformer is described by no family"):
        family_of(timm.create_model("swin_tiny_patch4_window7_224"))


def test_an_unknown_part_is_refused_by_module_name():
    net = tiny_net("vit")
    net.blocks[1].mlp.act = nn.Hardswish()
    with pytest.raises(UserError, match=r"module 'blocks\.1\.mlp\.act' is a Hardswish"):
        family_of(net)
