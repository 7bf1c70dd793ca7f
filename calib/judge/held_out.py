"""Whether changed weights serve the network's output on photographs they were not fitted on.

A layer's own error is a poor judge of that: in a transformer a few huge activations decide it.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from calib.images.batches import Batches, spread_images
from calib.judge.choice import BATCH as CHOICE_BATCH
from calib.judge.choice import IMAGES as CHOICE_IMAGES
from calib.judge.choice import least_error, output_terms
from calib.judge.decibels import decibels
from calib.network.qdq import quantized_net
from calib.network.rounded_layer import RoundedLayer, with_layers
from calib.quant_model import QuantModel

JUDGED = 64  # images per fold
BATCH = 16
MARGIN_DB = 0.1  # a smaller gain is chance


def sqnr_db(folds: Sequence[Batches], *candidates: Sequence[QuantModel], images: int = JUDGED) -> list[float]:
    """Output SQNR (dB) of each candidate over all folds; fold i - 1 runs through its i-th model, fitted on fold i.

    The candidates are repairs of one network: its float outputs are computed once for all. `images` of each fold are taken.
    """
    signal, noise = 0.0, [0.0] * len(candidates)
    for index, models in enumerate(zip(*candidates, strict=True)):
        nets = [quantized_net(model) for model in models]
        with torch.inference_mode():
            for batch in spread_images(folds[index - 1], images).split(BATCH):
                exact = models[0].float_net(batch).double()
                signal += float(exact.square().sum())
                for which, net in enumerate(nets):
                    noise[which] += float((net(batch) - exact).square().sum())
    return [decibels(signal, each) for each in noise]


def serving(plain: QuantModel, parts: Sequence[Mapping[str, RoundedLayer]], folds: Sequence[Batches]) -> list[str]:
    """Layers whose change the output of `plain` is better with; `parts[i]`, the same layers, was fitted on fold i.

    To first order in all of them (calib/judge/choice.py), each part judged on the next fold.
    """
    net, names = quantized_net(plain), list(parts[0])
    generator, terms = torch.Generator().manual_seed(0), []
    for index, layers in enumerate(parts):
        changed = quantized_net(with_layers(plain, layers))

        def change(name: str, x: torch.Tensor, y: torch.Tensor, changed: nn.Module = changed) -> torch.Tensor:
            return changed.get_submodule(name)(x) - y

        for batch in spread_images(folds[index - 1], CHOICE_IMAGES).split(CHOICE_BATCH):
            terms.append(output_terms(net, plain.float_net, names, batch, change, generator))
    made = least_error(torch.cat(terms), torch.zeros(len(names), dtype=torch.float64))
    return [name for name, one in zip(names, made, strict=True) if one]


def adopt_if_better(
    plain: QuantModel, found: Sequence[Mapping[str, RoundedLayer]], folds: Sequence[Batches]
) -> tuple[QuantModel, float, float, str]:
    """(model, dB before, dB after, what happened): `plain`, or with the last of `found` put in if that is better.

    `found` holds layers fitted on each of `folds`, then on all of them; the former decide, each on another fold. The last
    must not be worse on the images it was fitted on, either: that the parts gained is no promise for the whole. If all of
    them are not better, those that serve the output are tried alone.
    """
    before, after, fitted, whole = _tried(plain, found, folds)
    note = f"network output {after:.2f} dB against {before:.2f} dB on other photographs"
    if min(after - MARGIN_DB, fitted) >= before:
        return whole, before, after, note
    if fitted < before <= after - MARGIN_DB:
        note += f", but fitted on all of them {fitted:.2f} dB"
    names = serving(plain, found[:-1], folds) if found[0] else []
    if 0 < len(names) < len(found[0]):  # all of them have been tried
        few = [{name: layers[name] for name in names} for layers in found]
        before, after, fitted, whole = _tried(plain, few, folds)
        of_few = (
            f"the {len(names)} of {len(found[0])} layers that serve the output: {after:.2f} dB; all of them: {note}"
        )
        if min(after - MARGIN_DB, fitted) >= before:
            return whole, before, after, of_few
        note = of_few
    return plain, before, before, f"dropped: {note}"


def _tried(
    plain: QuantModel, found: Sequence[Mapping[str, RoundedLayer]], folds: Sequence[Batches]
) -> tuple[float, float, float, QuantModel]:
    """(dB before, after, and of all fitted on the images that judge, the model of the last of `found`)."""
    *parts, whole = (with_layers(plain, layers) for layers in found)
    before, after, fitted = sqnr_db(folds, [plain] * len(folds), parts, [whole] * len(folds))
    return before, after, fitted, whole
