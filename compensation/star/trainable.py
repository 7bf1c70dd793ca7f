"""What QwT* trains in a network: the branches beside its blocks."""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from calib.quant_model import QuantModel

BRANCH = ".branch."  # between the name of a block and the name of a parameter of its branch


def trained_parameters(net: nn.Module, model: QuantModel) -> dict[str, nn.Parameter]:
    """Return what trains in `net`, the quantized network of `model`, by name."""
    starts = tuple(f"{block}{BRANCH}" for block in model.branches)
    return {name: parameter for name, parameter in net.named_parameters() if name.startswith(starts)} if starts else {}


@torch.no_grad()
def with_values(model: QuantModel, values: dict[str, Tensor]) -> QuantModel:
    """Return a copy of `model` whose branches hold `values`, named as in its quantized network."""
    branches: dict[str, Any] = copy.deepcopy(model.branches)
    for name, value in values.items():
        block, _, parameter = name.partition(BRANCH)
        branches[block].get_parameter(parameter).copy_(value)
    return replace(model, branches=branches)
