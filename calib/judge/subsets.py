"""Candidates from layers that were fitted one by one: all of them, and those with which the output has the least error.

A layer's fit is judged by its own output, but several of them together can harm the network's output. To first order in all
of them (calib/judge/choice.py) any number of subsets can be compared; the spine then measures the candidates.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from calib.images.batches import Half, spread_images
from calib.judge.choice import BATCH, IMAGES, least_error, output_terms
from calib.judge.held_out import Candidate
from calib.network.qdq import quantized_net
from calib.network.rounded_layer import RoundedLayer, with_layers


def layer_terms(plain: Candidate, found: Sequence[Mapping[str, RoundedLayer]], halves: Sequence[Half]) -> Tensor:
    """Return the terms (S, 1 + L) of `output_terms` for the layers of `found`, on the images that choose.

    `found[i]` holds the same L layers, fitted on half i.
    """
    generator, terms = torch.Generator().manual_seed(0), []
    for index, layers in enumerate(found[: len(halves)]):
        model = plain.by_half[index]
        assert model is not None
        net, changed = quantized_net(model), quantized_net(with_layers(model, layers))

        def change(name: str, x: Tensor, y: Tensor, changed: nn.Module = changed) -> Tensor:
            return changed.get_submodule(name)(x) - y

        for batch in spread_images(halves[index - 1].choose, IMAGES).split(BATCH):
            terms.append(output_terms(net, model.float_net, list(layers), batch, change, generator))
    return torch.cat(terms)


def layer_candidates(
    plain: Candidate, found: Sequence[Mapping[str, RoundedLayer]], halves: Sequence[Half]
) -> list[Candidate]:
    """Return `plain` with fitted layers put in: a subset, then all of them. `found`: by half, then fitted on all images."""
    names = list(found[-1])
    if not names:
        return []

    def candidate(name: str, chosen: Sequence[str]) -> Candidate:
        models = [
            with_layers(model, {layer: layers[layer] for layer in chosen})
            for model, layers in zip((*plain.by_half, plain.whole), found, strict=True)
            if model is not None
        ]
        return Candidate(name, tuple(models[:-1]), models[-1])

    made = least_error(layer_terms(plain, found, halves), torch.zeros(len(names), dtype=torch.float64))
    subset = [name for name, one in zip(names, made, strict=True) if one]
    every = candidate(f"all {len(names)} fitted layers", names)
    if not 0 < len(subset) < len(names):
        return [every]
    return [candidate(f"{len(subset)} of {len(names)} fitted layers", subset), every]
