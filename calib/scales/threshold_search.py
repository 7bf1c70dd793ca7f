"""Which clipping thresholds serve the network's output best, on photographs that did not suggest them.

A layer's own error is no judge of this: in a transformer it favours clipping the few huge activations that later layers live
on. What the error of every threshold at every layer does to the output, to first order (calib/judge/first_order.py),
ranks rules for all layers and chooses thresholds layer by layer; the best of both are judged by the output when all
inputs round.

Thresholds come from one fold, the images they are judged on from another. Both folds must be new to each other, equalisation
included (calib/scales/channel_scale.py): by the channel scales of all folds together no photograph of theirs exceeds
a range, while new ones do, up to three times.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from calib.hooks import input_hooks
from calib.judge.decibels import decibels
from calib.judge.first_order import output_gradients, output_noise
from calib.network.layer_rows import channel_axis
from calib.quant_model import QuantModel
from calib.scales.channel_scale import FoldScale
from calib.statistics.observers import Histogram, amax_from_histogram

SEARCHED = (("max", 0.0), *(("percentile", p) for p in (99.9999, 99.999, 99.99, 99.9)), ("mse", 0.0), ("entropy", 0.0))
MARGINS = (1.25, 1.6, 2.0, 2.5)  # of the maximum: new photographs exceed it
FEW_BITS = (0.8, 0.65, 0.5, 0.35, 0.25)  # of the maximum: where levels are few, clipping pays
NOT_FOR_ALL = ("max x1.6", "max x2", "max x2.5")  # some layers need that much, never all of them: not judged as a rule
JUDGED_RULES = 3  # whose output is measured: those that are foretold the least noise
PER_LAYER = "per layer"

Offers = Mapping[str, Mapping[str, float]]  # layer -> candidate -> threshold
Thresholds = Mapping[str, float]  # by layer


def candidates(histogram: Histogram, bits: int = 8, few_bits: bool = False) -> dict[str, float]:
    """Clipping thresholds worth trying, by name. `few_bits`: some layer of the network has less than 8."""
    found = {
        f"{observer} {percentile:g}".removesuffix(" 0"): amax_from_histogram(histogram, observer, percentile, bits)
        for observer, percentile in SEARCHED
    }
    factors = (*(FEW_BITS if few_bits else ()), *MARGINS)
    return found | {f"max x{factor:g}": histogram.amax * factor for factor in factors}


@contextmanager
def rounded_inputs(net: nn.Module, rounded: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """While open, the layers named read what `rounded` makes of their inputs."""
    with input_hooks(net, rounded, lambda name, _layer, x: rounded[name](x)):
        yield


class Judge:
    """The network's noise when its inputs round: thresholds and channel scales of one fold, `images` of another.

    `scales`: by fold and layer. `images`: by fold, (B, 3, H, W), the images that judge it.
    """

    def __init__(self, model: QuantModel, scales: Sequence[Mapping[str, FoldScale]], images: Sequence[Tensor]) -> None:
        self.model, self.scales, self.images = model, scales, images
        with torch.inference_mode():
            self.exact = [model.float_net(batch) for batch in images]

    def _rounding(self, fold: int, layer: str, amax: float) -> Callable[[Tensor], Tensor]:
        scale, bits = self.scales[fold][layer], self.model.bits(layer).input
        axis = channel_axis(self.model.net.get_submodule(layer))
        return lambda x: scale.fake_quantize(x, amax, bits, axis)

    def db(self, thresholds: Sequence[Thresholds]) -> float:
        """SQNR of the output; `thresholds` by fold."""
        noise = 0.0
        with torch.inference_mode():
            for fold, (images, exact) in enumerate(zip(self.images, self.exact, strict=True)):
                rounded = {layer: self._rounding(fold, layer, amax) for layer, amax in thresholds[fold].items()}
                with rounded_inputs(self.model.net, rounded):
                    noise += float((self.model.net(images) - exact).square().sum())
        return decibels(sum(float(exact.square().sum()) for exact in self.exact), noise)

    def alone(self, offers: Sequence[Offers]) -> dict[str, dict[str, float]]:
        """Squared error of the output, to first order, by layer and candidate, if that layer alone rounds."""
        layers = list(offers[0])
        noise = {layer: dict.fromkeys(offers[0][layer], 0.0) for layer in layers}
        for fold, images in enumerate(self.images):
            for seen in output_gradients(self.model.net, layers, images):
                for layer, x in seen.inputs.items():
                    for candidate, amax in offers[fold][layer].items():
                        error = self._rounding(fold, layer, amax)(x) - x
                        noise[layer][candidate] += output_noise(seen.gradients[layer], error)
        return noise


def search(judge: Judge, offers: Sequence[Offers]) -> tuple[dict[str, str], str]:
    """(candidate by layer, what was found). `offers`: by fold, the same candidates for every layer."""
    alone = judge.alone(offers)
    offered = list(next(iter(offers[0].values())))
    rules = [each for each in offered if each not in NOT_FOR_ALL]
    foretold = {rule: sum(noise[rule] for noise in alone.values()) for rule in rules}

    def measured(picks: Mapping[str, str]) -> float:
        return judge.db([{layer: of_fold[layer][pick] for layer, pick in picks.items()} for of_fold in offers])

    choices = {
        rule: dict.fromkeys(alone, rule) for rule in sorted(rules, key=lambda rule: foretold[rule])[:JUDGED_RULES]
    }
    reached = {name: measured(picks) for name, picks in choices.items()}
    best = max(reached, key=lambda name: reached[name])

    def no_narrower(layer: str) -> list[str]:
        return [each for each in offered if all(of[layer][each] >= of[layer][best] for of in offers)]

    for name, among in ((PER_LAYER, lambda _: offered), (f"{PER_LAYER}, no narrower than {best}", no_narrower)):
        choices[name] = {layer: min(among(layer), key=lambda each: noise[each]) for layer, noise in alone.items()}
        reached[name] = measured(choices[name])
    ranked = sorted(reached, key=lambda name: -reached[name])
    shown = ", ".join(f"{name} {reached[name]:.1f} dB" for name in ranked)
    return choices[ranked[0]], f"by '{ranked[0]}' ({shown} on other photographs)"
