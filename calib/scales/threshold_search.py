"""Which clipping thresholds give the network's output the least error on images that did not suggest them.

A layer's own error does not tell: in a transformer it favours clipping the few huge activations that later layers need.
What the error of every threshold at every layer does to the output, to first order (calib/judge/first_order.py), ranks
rules that all layers follow, and picks a threshold for each layer. The plainest choice is the best rule; then a layer leaves
the rule only where its gain exceeds the standard error over source images; then every layer takes the threshold with the
least error. Layers that read one tensor choose together, by the sum of their errors, so that an engine rounds it once. A
choice replaces a plainer one only if the judge says so (calib/judge/held_out.py).

Thresholds come from one half of the calibration images, the images that choose and judge from the other. Both halves must
be new to each other, equalisation included (calib/scales/channel_scale.py): with the channel scales of all calibration
images none of them exceeds a range, while new images do, up to three times.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from calib.hooks import input_hooks
from calib.images.batches import ROTATIONS
from calib.judge.first_order import noise_by_image, output_gradients
from calib.judge.held_out import Errors, Gain, plainest_best
from calib.network.layer_rows import channel_axis
from calib.quant_model import QuantModel
from calib.scales.channel_scale import FoldScale
from calib.statistics.observers import Histogram, amax_from_histogram

SEARCHED = (("max", 0.0), *(("percentile", p) for p in (99.9999, 99.999, 99.99, 99.9)), ("mse", 0.0), ("entropy", 0.0))
MARGINS = (1.25, 1.6, 2.0, 2.5)  # of the maximum: new images exceed it
FEW_BITS = (0.8, 0.65, 0.5, 0.35, 0.25)  # of the maximum: where levels are few, clipping pays
NOT_FOR_ALL = ("max x1.6", "max x2", "max x2.5")  # some layers need that much, never all of them: not tried as a rule
MEASURED_RULES = 3  # whose output error is measured: those with the least error to first order
PER_LAYER = "least error per layer"

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


Images = tuple[Tensor, list[int]]  # (B, 3, H, W), and the number of the source image of each
Noise = dict[str, dict[str, Tensor]]  # by layer and candidate: squared output error by source image, float64
Picks = dict[str, str]  # candidate by layer


class RoundedInputs:
    """The network with its inputs rounded: thresholds and channel scales of one half, run on images of the other.

    `scales`: by half and layer. `choose[i][p]` and `judge[i][p]` hold images of part p of the half that half i was not
    fitted on.
    """

    def __init__(
        self,
        model: QuantModel,
        scales: Sequence[Mapping[str, FoldScale]],
        choose: Sequence[Sequence[Images]],
        judge: Sequence[Sequence[Images]],
    ) -> None:
        self.model, self.scales, self.choose, self.judge = model, scales, choose, judge

    def _rounding(self, half: int, layer: str, amax: float) -> Callable[[Tensor], Tensor]:
        scale, bits = self.scales[half][layer], self.model.bits(layer).input
        axis = channel_axis(self.model.net.get_submodule(layer))
        return lambda x: scale.fake_quantize(x, amax, bits, axis)

    def _net(self, half: int, thresholds: Thresholds) -> Callable[[Tensor], Tensor]:
        rounded = {layer: self._rounding(half, layer, amax) for layer, amax in thresholds.items()}

        def run(x: Tensor) -> Tensor:
            with rounded_inputs(self.model.net, rounded):
                return self.model.net(x)

        return run

    def errors(
        self, images: Sequence[Sequence[Images]], parts: Sequence[int], alternatives: Sequence[Sequence[Thresholds]]
    ) -> Errors:
        """Return the output errors of `alternatives`, each with its thresholds by half, on `parts` of `images`."""
        errors = Errors(len(alternatives))
        for half, of_half in enumerate(images):
            nets = [self._net(half, thresholds[half]) for thresholds in alternatives]
            for part in parts:
                batch, numbers = of_half[part]
                errors.add(self.model.float_net, nets, batch, [(half, part, number) for number in numbers])
        return errors

    def alone(self, offers: Sequence[Offers]) -> list[Noise]:
        """Return, by part, the squared output error, to first order, if a layer alone rounds at a candidate's threshold."""
        return [self._alone(offers, part) for part, _ in ROTATIONS]

    def _alone(self, offers: Sequence[Offers], part: int) -> Noise:
        layers = list(offers[0])
        numbers = {
            source: index
            for index, source in enumerate(
                dict.fromkeys((half, source) for half in range(len(offers)) for source in self.choose[half][part][1])
            )
        }
        noise = {
            layer: {each: torch.zeros(len(numbers), dtype=torch.float64) for each in offers[0][layer]}
            for layer in layers
        }
        for half, of_half in enumerate(offers):
            images, sources = self.choose[half][part]
            places = torch.tensor([numbers[half, source] for source in sources])
            start = 0
            for seen in output_gradients(self.model.net, layers, images):
                here = places[start : start + seen.images]
                start += len(here)
                for layer, x in seen.inputs.items():
                    for candidate, amax in of_half[layer].items():
                        error = self._rounding(half, layer, amax)(x) - x
                        found = noise_by_image(seen.gradients[layer], error, seen.images).double()
                        noise[layer][candidate].index_add_(0, here, found)
        return noise


def _joined(parts: Sequence[Noise]) -> Noise:
    """Return the noise of the source images of all parts."""
    return {
        layer: {candidate: torch.cat([part[layer][candidate] for part in parts]) for candidate in of_layer}
        for layer, of_layer in parts[0].items()
    }


def together(noise: Noise, groups: Sequence[Sequence[str]]) -> Noise:
    """Return `noise` with the sum over all layers of a group in the place of each: they choose alike."""
    joined = dict(noise)
    for group in groups:
        present = [layer for layer in group if layer in noise]
        if present:
            names = noise[present[0]]
            sums = {each: torch.stack([noise[layer][each] for layer in present]).sum(0) for each in names}
            joined |= dict.fromkeys(present, sums)
    return joined


def least(of_layer: Mapping[str, Tensor]) -> str:
    """Return the candidate with the least noise over all source images."""
    return min(of_layer, key=lambda each: float(of_layer[each].sum()))


def better_than(rule: str, of_layer: Mapping[str, Tensor]) -> str:
    """Return the candidate with the least noise, or `rule` unless the gain exceeds its standard error over source images."""
    best = least(of_layer)
    gains = of_layer[rule] - of_layer[best]
    error = float(gains.std()) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    return best if float(gains.mean()) > error else rule


class Search:
    """The choice of thresholds by some parts of the images; `offers`: by half, the same candidates for every layer."""

    def __init__(self, inputs: RoundedInputs, offers: Sequence[Offers], noise: Noise, parts: Sequence[int]) -> None:
        self.offers = offers
        rules = [rule for rule in next(iter(noise.values())) if rule not in NOT_FOR_ALL]
        foretold = {rule: sum(float(of_layer[rule].sum()) for of_layer in noise.values()) for rule in rules}
        measured = sorted(rules, key=lambda rule: foretold[rule])[:MEASURED_RULES]
        thresholds = [self.thresholds(dict.fromkeys(noise, rule)) for rule in measured]
        errors = inputs.errors(inputs.choose, parts, thresholds)
        self.rule = max(zip(measured, range(len(measured)), strict=True), key=lambda each: errors.db(each[1]))[0]
        self.choices: dict[str, Picks] = {
            f"'{self.rule}'": dict.fromkeys(noise, self.rule),
            "another rule where its gain is certain": {
                layer: better_than(self.rule, of_layer) for layer, of_layer in noise.items()
            },
            PER_LAYER: {layer: least(of_layer) for layer, of_layer in noise.items()},
        }

    def thresholds(self, picks: Picks) -> list[Thresholds]:
        """Return the thresholds of `picks` by half."""
        return [{layer: of_half[layer][pick] for layer, pick in picks.items()} for of_half in self.offers]


def search(inputs: RoundedInputs, offers: Sequence[Offers]) -> tuple[Picks, Gain, str]:
    """Return (candidate by layer, gain over the best rule, what was found).

    `offers`: by half, the same candidates for every layer.
    """
    alone = [together(part, inputs.model.structure.read_together) for part in inputs.alone(offers)]
    found = Search(inputs, offers, _joined(alone), [choose for choose, _ in ROTATIONS])
    errors = Errors(len(found.choices))
    for choose, judge in ROTATIONS:
        here = Search(inputs, offers, alone[choose], [choose])
        errors.merge(inputs.errors(inputs.judge, [judge], [here.thresholds(each) for each in here.choices.values()]))
    kept = plainest_best(errors)
    names = list(found.choices)
    others = (f"{name} {errors.gain(0, index).mean_db:+.2f} dB" for index, name in enumerate(names) if index)
    measured = f"{errors.db(0):.2f} dB by the best rule for all layers; {', '.join(others)}"
    picks = found.choices[names[kept]]
    return picks, errors.gain(0, kept), f"by {names[kept]} (output SQNR on held-out images {measured})"
