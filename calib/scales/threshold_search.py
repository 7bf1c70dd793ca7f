"""Which clipping thresholds give the network's output the least error on images that did not suggest them.

A layer's own error does not tell: in a transformer it favours clipping the few huge activations that later layers need.
What the error of every threshold at every layer does to the output, to first order (calib/judge/first_order.py), ranks
rules that all layers follow, and picks a threshold for each layer. The plainest choice is the best rule. Thresholds picked
layer by layer replace it only if the judge says so (calib/judge/held_out.py).

Thresholds come from one half of the calibration images, the images that choose and judge from the other. Both halves must
be new to each other, equalisation included (calib/scales/channel_scale.py): with the channel scales of all calibration
images none of them exceeds a range, while new images do, up to three times.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from calib.hooks import input_hooks
from calib.judge.first_order import output_gradients, output_noise
from calib.judge.held_out import Errors, Gain
from calib.network.layer_rows import channel_axis
from calib.quant_model import QuantModel
from calib.scales.channel_scale import FoldScale
from calib.statistics.observers import Histogram, amax_from_histogram

SEARCHED = (("max", 0.0), *(("percentile", p) for p in (99.9999, 99.999, 99.99, 99.9)), ("mse", 0.0), ("entropy", 0.0))
MARGINS = (1.25, 1.6, 2.0, 2.5)  # of the maximum: new photographs exceed it
FEW_BITS = (0.8, 0.65, 0.5, 0.35, 0.25)  # of the maximum: where levels are few, clipping pays
NOT_FOR_ALL = ("max x1.6", "max x2", "max x2.5")  # some layers need that much, never all of them: not tried as a rule
MEASURED_RULES = 3  # whose output error is measured: those with the least error to first order
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


Images = tuple[Tensor, list[int]]  # (B, 3, H, W), and the number of the source image of each


class RoundedInputs:
    """The network with its inputs rounded: thresholds and channel scales of one half, run on images of the other.

    `scales`: by half and layer. Of `choose` and `judge`, each by half, entry i holds images that half i was not fitted on.
    """

    def __init__(
        self,
        model: QuantModel,
        scales: Sequence[Mapping[str, FoldScale]],
        choose: Sequence[Images],
        judge: Sequence[Images],
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

    def errors(self, images: Sequence[Images], alternatives: Sequence[Sequence[Thresholds]]) -> Errors:
        """Return the output errors of `alternatives`, each with its thresholds by half."""
        errors = Errors(len(alternatives))
        for half, (batch, sources) in enumerate(images):
            nets = [self._net(half, thresholds[half]) for thresholds in alternatives]
            errors.add(self.model.float_net, nets, batch, [(half, source) for source in sources])
        return errors

    def alone(self, offers: Sequence[Offers]) -> dict[str, dict[str, float]]:
        """Return the squared output error, to first order, by layer and candidate, if that layer alone rounds."""
        layers = list(offers[0])
        noise = {layer: dict.fromkeys(offers[0][layer], 0.0) for layer in layers}
        for half, (images, _) in enumerate(self.choose):
            for seen in output_gradients(self.model.net, layers, images):
                for layer, x in seen.inputs.items():
                    for candidate, amax in offers[half][layer].items():
                        error = self._rounding(half, layer, amax)(x) - x
                        noise[layer][candidate] += output_noise(seen.gradients[layer], error)
        return noise


def _no_narrower(offers: Sequence[Offers], layer: str, rule: str) -> list[str]:
    """Return the candidates of `layer` that clip no more than `rule` does, in any half."""
    return [each for each in offers[0][layer] if all(of[layer][each] >= of[layer][rule] for of in offers)]


def search(inputs: RoundedInputs, offers: Sequence[Offers]) -> tuple[dict[str, str], Gain, str]:
    """Return (candidate by layer, gain over the best rule, what was found).

    `offers`: by half, the same candidates for every layer.
    """
    alone = inputs.alone(offers)
    offered = list(next(iter(offers[0].values())))
    rules = [each for each in offered if each not in NOT_FOR_ALL]
    foretold = {rule: sum(noise[rule] for noise in alone.values()) for rule in rules}

    def thresholds(picks: Mapping[str, str]) -> list[Thresholds]:
        return [{layer: of_half[layer][pick] for layer, pick in picks.items()} for of_half in offers]

    def best(choices: Mapping[str, Mapping[str, str]]) -> str:
        errors = inputs.errors(inputs.choose, [thresholds(picks) for picks in choices.values()])
        return max(zip(choices, range(len(choices)), strict=True), key=lambda each: errors.db(each[1]))[0]

    measured = sorted(rules, key=lambda rule: foretold[rule])[:MEASURED_RULES]
    rule = best({rule: dict.fromkeys(alone, rule) for rule in measured})
    by_layer = {
        PER_LAYER: {layer: min(noise, key=lambda each: noise[each]) for layer, noise in alone.items()},
        f"{PER_LAYER}, no narrower than {rule}": {
            layer: min(_no_narrower(offers, layer, rule), key=lambda each: noise[each])
            for layer, noise in alone.items()
        },
    }
    name = best(by_layer)
    plain = dict.fromkeys(alone, rule)
    gain = inputs.errors(inputs.judge, [thresholds(plain), thresholds(by_layer[name])]).gain(0, 1)
    if gain.holds:
        return by_layer[name], gain, f"'{name}' over '{rule}': {gain.text()}"
    return plain, gain._replace(after_db=gain.before_db), f"'{rule}'; dropped: '{name}': {gain.text()}"
