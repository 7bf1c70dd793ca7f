"""Candidates from layers that were fitted one by one: all of them, and those with which the output has the least error.

A layer's fit is judged by its own output, but several of them together can harm the network's output. To first order in all
of them (calib/judge/choice.py) any number of subsets can be compared; the spine then measures the candidates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from calib.images.batches import ROTATIONS, Half, spread_images
from calib.judge.choice import BATCH, IMAGES, least_error, output_terms
from calib.judge.held_out import Candidate
from calib.layerwise.layer_fits import FittedLayers
from calib.network.qdq import quantized_net
from calib.network.rounded_layer import with_layers


def layer_terms(
    plain: Candidate, found: FittedLayers, names: Sequence[str], rotation: int, halves: Sequence[Half]
) -> Tensor:
    """Return the terms (S, 1 + L) of `output_terms` for the layers `names`, on the images that choose in `rotation`.

    A layer that has no fit in this rotation changes nothing.
    """
    generator, terms = torch.Generator().manual_seed(0), []
    part, _ = ROTATIONS[rotation]
    for half, layers in enumerate(found.trials[rotation]):
        model = plain.trials[rotation][half]
        assert model is not None
        net, changed = quantized_net(model), quantized_net(with_layers(model, layers))

        def change(name: str, x: Tensor, y: Tensor, changed: nn.Module = changed) -> Tensor:
            return changed.get_submodule(name)(x) - y

        for batch in spread_images(halves[half - 1].parts[part], IMAGES).split(BATCH):
            terms.append(output_terms(net, model.float_net, names, batch, change, generator))
    return torch.cat(terms)


def _subset(terms: Tensor, names: Sequence[str]) -> list[str]:
    made = least_error(terms, torch.zeros(len(names), dtype=torch.float64))
    return [name for name, one in zip(names, made, strict=True) if one]


def layer_candidates(plain: Candidate, found: FittedLayers, halves: Sequence[Half]) -> list[Candidate]:
    """Return `plain` with fitted layers put in: with a subset of them, then with all. None if no layer was fitted."""
    names = list(found.whole)
    if not names:
        return []
    every = [*names, *(name for name in plain.whole.layers if name not in names)]
    terms = [layer_terms(plain, found, every, rotation, halves) for rotation in range(len(ROTATIONS))]
    subsets = [_subset(of_rotation, every) for of_rotation in terms]
    subset = [name for name in _subset(torch.cat(terms), every) if name in found.whole]

    def candidate(title: str, chosen: Sequence[str], by_rotation: Sequence[Sequence[str]]) -> Candidate:
        trials = tuple(
            tuple(
                model and with_layers(model, {name: layer for name, layer in layers.items() if name in names})
                for model, layers in zip(models, of_rotation, strict=True)
            )
            for models, of_rotation, names in zip(plain.trials, found.trials, by_rotation, strict=True)
        )
        return Candidate(title, trials, with_layers(plain.whole, {name: found.whole[name] for name in chosen}))

    whole = candidate(f"all {len(names)} fitted layers", names, [every] * len(ROTATIONS))
    if not 0 < len(subset) < len(names):
        return [whole]
    return [candidate(f"{len(subset)} of {len(names)} fitted layers", subset, subsets), whole]
