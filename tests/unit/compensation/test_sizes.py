"""The sizes in the tables of the QwT paper and its appendix, from shapes alone."""

import functools
import re

import pytest
import timm
import torch

from compensation.layout import layout_from_shapes
from compensation.sizes import branch_bytes, float_bytes, model_bytes
from tests.unit.compensation.test_branch import branch_of

MB = 1e6
VIT = (r"blocks\.\d+", r"patch_embed\.proj|head", True)
SWIN = (r"layers\.\d\.blocks\.\d+", r"patch_embed\.proj|head\.fc", True)
RESNET = (r"layer\d\.\d+", r"conv1|fc", False)

# name: (blocks, stem and head, channels last), parameters / 10^6, float MB, {bits: (MB, MB with branches)}, branches MB
PAPER = {
    "deit_tiny_patch16_224": (VIT, 5.717, 22.9, {4: (3.27, 4.17), 6: (4.60, 5.49), 8: (5.93, 6.82)}, 0.894),
    "vit_small_patch16_224": (VIT, 22.051, 88.2, {4: (11.85, 15.41), 6: (17.16, 20.71), 8: (22.46, 26.02)}, 3.557),
    "deit_small_patch16_224": (VIT, 22.051, 88.2, {4: (11.85, 15.41), 6: (17.16, 20.71), 8: (22.46, 26.02)}, 3.557),
    "vit_base_patch16_224": (VIT, 86.568, 346.3, {4: (44.93, 59.12), 6: (66.16, 80.35), 8: (87.39, 101.59)}, 14.193),
    "deit_base_patch16_224": (VIT, 86.568, 346.3, {4: (44.93, 59.12), 6: (66.16, 80.35), 8: (87.39, 101.59)}, 14.193),
    "swin_tiny_patch4_window7_224":
        (SWIN, 28.288, 113.2, {4: (14.85, 19.18), 6: (21.70, 26.03), 8: (28.56, 32.89)}, 4.331),
    "swin_small_patch4_window7_224":
        (SWIN, 49.606, 198.4, {4: (25.80, 33.69), 6: (37.97, 45.85), 8: (50.13, 58.02)}, 7.888),
    "swin_base_patch4_window7_224":
        (SWIN, 87.768, 351.1, {4: (45.21, 59.22), 6: (66.84, 80.85), 8: (88.47, 102.47)}, 14.007),
    "resnet18": (RESNET, 11.690, 46.8, {4: (6.14, 6.40), 6: (8.93, 9.19), 8: (11.72, 11.97)}, 0.253),
    "resnet50": (RESNET, 25.557, 102.2, {4: (14.00, 15.99), 6: (19.86, 21.85), 8: (25.72, 27.71)}, 1.994),
    "resnet101": (RESNET, 44.549, 178.2, {4: (23.68, 27.97), 6: (34.27, 38.56), 8: (44.87, 49.16)}, 4.292),
}  # fmt: skip


@functools.cache
def network(name):
    """(the network without storage, bytes of a dense branch for every block)."""
    block_pattern, _, channels_last = PAPER[name][0]
    with torch.device("meta"):
        net, bytes_of = timm.create_model(name).eval(), []

        def after(_block, inputs, output):
            layout = layout_from_shapes("block", inputs[0].shape, output.shape, channels_last)
            bytes_of.append(branch_bytes(branch_of(layout, 1.0)))

        for module_name, module in net.named_modules():
            if re.fullmatch(block_pattern, module_name):
                module.register_forward_hook(after)
        with torch.no_grad():
            net(torch.zeros(2, 3, 224, 224))
    return net, bytes_of


@pytest.mark.parametrize("name", PAPER)
def test_sizes_of_the_paper(name):
    (_, eight_bit, _), parameters, in_float, sizes, branches = PAPER[name]
    net, bytes_of = network(name)
    assert sum(p.numel() for p in net.parameters()) / MB == pytest.approx(parameters, abs=5e-4)
    assert float_bytes(net) / MB == pytest.approx(in_float, abs=0.05)
    assert sum(bytes_of) / MB == pytest.approx(branches, abs=6e-4)
    # The second digit is exact but for Swin, which comes out 0 to 0.01 MB lighter than the table, for no known reason.
    limit = 0.011 if name.startswith("swin") else 0.00501
    for bits, (alone, compensated) in sizes.items():
        found = model_bytes(net, eight_bit, bits)
        assert found / MB == pytest.approx(alone, abs=limit)
        assert (found + sum(bytes_of)) / MB == pytest.approx(compensated, abs=limit)


def test_the_layers_named_keep_eight_bits():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 2), torch.nn.Linear(5, 4, bias=False), torch.nn.LayerNorm(4))
    assert float_bytes(net) == 4 * (60 + 5 + 20 + 8)
    assert model_bytes(net, "0", 4) == 60 + 20 / 2 + 4 * (5 + 8)
    assert model_bytes(net, "", 2) == 80 / 4 + 4 * (5 + 8)
