"""Which of the fitted branches the network's output is better without: block errors are of one currency in no CNN."""

from collections.abc import Iterable, Sequence

import torch

from calib.images.batches import Batches, spread_images
from calib.judge.choice import BATCH, IMAGES, least_error, output_terms
from calib.network.qdq import quantized_net
from calib.quant_model import QuantModel


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
            output_terms(net, judge.float_net, modules, batch, lambda _name, _x, z: -z, generator)
            for index, judge in enumerate(judges)
            for net in [quantized_net(judge)]
            for batch in spread_images(folds[index - 1], IMAGES).split(BATCH)
        ]
    )
    without = float((terms.sum(1)).square().sum())
    saved = torch.tensor([kernel_price * count * without / len(blocks) for count in kernels], dtype=torch.float64)
    left_out = least_error(terms, -saved)
    return [block for block, gone in zip(blocks, left_out, strict=True) if not gone]
