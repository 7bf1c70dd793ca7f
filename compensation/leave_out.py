"""Which of the fitted branches lower the network's output error: errors of different blocks of a CNN are not comparable."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from calib.images.batches import ROTATIONS, Half, spread_images
from calib.judge.choice import BATCH, IMAGES, least_error, output_terms
from calib.judge.held_out import Candidate
from calib.network.qdq import quantized_net


def branch_terms(candidate: Candidate, blocks: Sequence[str], rotation: int, halves: Sequence[Half]) -> Tensor:
    """Return the terms (S, 1 + L) of `output_terms` for leaving out the branches at `blocks`, on the images that choose.

    A block without a branch in this rotation changes nothing.
    """
    generator, found = torch.Generator().manual_seed(0), []
    part, _ = ROTATIONS[rotation]
    for half, model in enumerate(candidate.trials[rotation]):
        assert model is not None
        present = [block for block in blocks if block in model.branches]
        modules = [f"{block}.branch" for block in present]
        net = quantized_net(model)
        for batch in spread_images(halves[half - 1].parts[part], IMAGES).split(BATCH):
            terms = output_terms(net, model.float_net, modules, batch, lambda _name, _x, z: -z, generator)
            padded = terms.new_zeros(len(terms), 1 + len(blocks))
            padded[:, [0, *(1 + blocks.index(block) for block in present)]] = terms
            found.append(padded)
    return torch.cat(found)


def worth_keeping(
    candidate: Candidate, halves: Sequence[Half], kernels: Mapping[str, int], min_r2_per_kernel: float
) -> tuple[list[str], list[list[str]]]:
    """Return the blocks whose branches stay, by all images that choose and by those of each rotation.

    `kernels`: by block, those its branch adds; each must remove `min_r2_per_kernel` of an average block's error.
    """
    blocks = list(candidate.whole.branches)
    terms = [branch_terms(candidate, blocks, rotation, halves) for rotation in range(len(ROTATIONS))]

    def kept(terms: Tensor) -> list[str]:
        without = float(terms.sum(1).square().sum())
        shares = [min_r2_per_kernel * kernels[block] * without / len(blocks) for block in blocks]
        left_out = least_error(terms, -torch.tensor(shares, dtype=torch.float64))
        return [block for block, gone in zip(blocks, left_out, strict=True) if not gone]

    by_rotation = [
        [block for block in kept(of_rotation) if all(block in model.branches for model in models if model)]
        for of_rotation, models in zip(terms, candidate.trials, strict=True)
    ]
    return kept(torch.cat(terms)), by_rotation
