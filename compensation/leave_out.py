"""Which of the fitted branches lower the network's output error: errors of different blocks of a CNN are not comparable."""

from collections.abc import Iterable, Sequence

import torch

from calib.images.batches import Half, spread_images
from calib.judge.choice import BATCH, IMAGES, least_error, output_terms
from calib.network.qdq import quantized_net
from calib.quant_model import QuantModel


def worth_keeping(
    by_half: Sequence[QuantModel | None], halves: Sequence[Half], kernels: Iterable[int], min_r2_per_kernel: float
) -> list[str]:
    """Return the blocks whose branches stay. `by_half[i]`, with branches at the same blocks, was fitted on half i.

    `kernels` of each branch: each must remove `min_r2_per_kernel` of an average block's share of the output's error.
    """
    fitted = [(index, model) for index, model in enumerate(by_half) if model is not None]
    blocks = list(fitted[0][1].branches)
    modules = [f"{block}.branch" for block in blocks]
    generator = torch.Generator().manual_seed(0)
    terms = torch.cat(
        [
            output_terms(net, model.float_net, modules, batch, lambda _name, _x, z: -z, generator)
            for index, model in fitted
            for net in [quantized_net(model)]
            for batch in spread_images(halves[index - 1].choose, IMAGES).split(BATCH)
        ]
    )
    without = float((terms.sum(1)).square().sum())
    saved = torch.tensor([min_r2_per_kernel * count * without / len(blocks) for count in kernels], dtype=torch.float64)
    left_out = least_error(terms, -saved)
    return [block for block, gone in zip(blocks, left_out, strict=True) if not gone]
