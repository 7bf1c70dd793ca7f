"""Which of the fitted branches the network's output is better without: block errors are of one currency in no CNN.

To first order in the branches z_l (B, ...) that are left out, with g_l = dr.y / dz_l and r ~ N(0, I) as in
calib/first_order.py, the output misses the exact one by

    t = r.(y_exact - y) + sum over those left out of g_l . z_l

One backward pass per r gives every term at once, so any number of choices can be compared: errors that cancel each other,
or add up, are seen.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from calib.batches import Batches, spread_images
from calib.first_order import leaf, projections
from calib.hooks import output_hooks
from calib.qdq import quantized_net
from calib.quant_model import QuantModel

IMAGES = 16  # per fold
BATCH = 2  # images at a time


def _terms(
    net: nn.Module, exact: nn.Module, modules: Sequence[str], images: Tensor, generator: torch.Generator
) -> Tensor:
    """(B K, 1 + L): r.(y_exact - y), then g_l . z_l of the L `modules` of `net`, for each image and each r."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, z: Tensor) -> Tensor:
        outputs[name] = leaf(z)
        return outputs[name]

    with torch.enable_grad(), output_hooks(net, modules, keep):
        y = net(images)
    z = [outputs[name] for name in modules]
    difference, found = exact(images) - y.detach(), []
    for vector in projections(y, generator):
        gradients = torch.autograd.grad(y, z, vector, retain_graph=True)
        pairs = [(vector, difference), *zip(gradients, z, strict=True)]
        found.append(torch.stack([(one * other).detach().flatten(1).sum(1) for one, other in pairs], 1))
    return torch.cat(found).double()


def least_error(terms: Tensor, prices: Tensor) -> list[bool]:
    """Which of L branches stay: least sum over samples of t^2 plus `prices` (L,) of those that stay.

    `terms` (S, 1 + L) as of `_terms`. One branch at a time changes sides, the one that gains most, from all and from none.
    """
    missing, lost = terms[:, 0], terms[:, 1:]

    def cost(stays: Tensor) -> float:
        return float((missing + lost @ (1 - stays)).square().sum() + (prices * stays).sum())

    ends = []
    for stays in (lost.new_ones(lost.shape[1]), lost.new_zeros(lost.shape[1])):
        now = cost(stays)
        while True:
            flipped = torch.where(torch.eye(len(stays), dtype=torch.bool), 1 - stays, stays)
            costs = [cost(each) for each in flipped]
            best = min(range(len(costs)), key=lambda index: costs[index])
            if costs[best] >= now:
                break
            now, stays = costs[best], flipped[best]
        ends.append((now, stays))
    return [bool(each) for each in min(ends, key=lambda end: end[0])[1]]


def worth_keeping(
    judges: Sequence[QuantModel], folds: Sequence[Batches], kernels: Iterable[int], kernel_price: float
) -> list[str]:
    """Blocks whose branches stay. `judges[i]`, with branches at the same blocks, was fitted without fold i - 1.

    `kernels` of each branch, which must bring `kernel_price` of an average block's share of the output's error each.
    """
    blocks = list(judges[0].branches)
    modules = [f"{block}.branch" for block in blocks]
    generator = torch.Generator().manual_seed(0)
    terms = torch.cat(
        [
            _terms(net, judge.float_net, modules, batch, generator)
            for index, judge in enumerate(judges)
            for net in [quantized_net(judge)]
            for batch in spread_images(folds[index - 1], IMAGES).split(BATCH)
        ]
    )
    without = float((terms.sum(1)).square().sum())
    prices = torch.tensor([kernel_price * count * without / len(blocks) for count in kernels], dtype=torch.float64)
    stays = least_error(terms, prices)
    return [block for block, stay in zip(blocks, stays, strict=True) if stay]
