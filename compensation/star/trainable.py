"""What QwT* trains in a network: the branches beside its blocks, and its classifier."""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from calib.network.qdq import quantized_net
from calib.quant_model import QuantModel
from compensation.branch import ConvBranch, DenseBranch
from compensation.chain import block_layouts
from compensation.moments import Fit

BRANCH = ".branch."  # between the name of a block and the name of a parameter of its branch


def zero_branches(model: QuantModel, images: Tensor) -> dict[str, DenseBranch | ConvBranch]:
    """A dense branch of zeros for every block of `model` without one; `images` (B, 3, H, W) give the shapes.

    Raises ValueError naming the blocks if they are no chain.
    """
    found: dict[str, DenseBranch | ConvBranch] = {}
    for name, layout in block_layouts(model, quantized_net(model), images).items():
        if name not in model.branches:
            zero = Fit(torch.zeros(layout.d_out, layout.d_in), torch.zeros(layout.d_out))
            tokens = layout.channels_last
            found[name] = DenseBranch(zero) if tokens else ConvBranch([zero] * layout.groups, layout.stride)
    return found


def classifier_layers(net: Any) -> tuple[str, ...]:
    """Names of the float Linear layers that turn features into logits; none without classes, two if distilled."""
    found = net.get_classifier()
    parts = found if isinstance(found, tuple) else (found,)
    return tuple(
        name
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear) and any(module is part for part in parts)
    )


def trained_parameters(net: nn.Module, model: QuantModel, classifier: bool) -> dict[str, nn.Parameter]:
    """What trains in `net`, the quantized network of `model`, by name."""
    starts = tuple(f"{block}{BRANCH}" for block in model.branches)
    if classifier:
        starts += tuple(f"{layer}." for layer in classifier_layers(net))
    return {name: parameter for name, parameter in net.named_parameters() if name.startswith(starts)}


@torch.no_grad()
def with_values(model: QuantModel, values: dict[str, Tensor]) -> QuantModel:
    """A copy of `model` whose branches and classifier hold `values`, named as in its quantized network."""
    branches: dict[str, Any] = copy.deepcopy(model.branches)
    classifier = {}
    for name, value in values.items():
        block, of_branch, parameter = name.partition(BRANCH)
        if of_branch:
            branches[block].get_parameter(parameter).copy_(value)
        else:
            classifier[name] = value
    net = copy.deepcopy(model.net) if classifier else model.net
    for name, value in classifier.items():
        net.get_parameter(name).copy_(value)
    return replace(model, branches=branches, net=net)
