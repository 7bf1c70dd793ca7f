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
from calib.images.batches import ROTATIONS
from calib.judge.first_order import output_gradients, output_noise
from calib.judge.held_out import Errors, Gain
from calib.network.layer_rows import channel_axis
from calib.quant_model import QuantModel
from calib.scales.channel_scale import FoldScale
from calib.statistics.observers import Histogram, amax_from_histogram

SEARCHED = (("max", 0.0), *(("percentile", p) for p in (99.9999, 99.999, 99.99, 99.9)), ("mse", 0.0), ("entropy", 0.0))
MARGINS = (1.25, 1.6, 2.0, 2.5)  # of the maximum: new images exceed it
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
Noise = dict[str, dict[str, float]]  # by layer and candidate
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
        layers = list(offers[0])
        found: list[Noise] = [{layer: dict.fromkeys(offers[0][layer], 0.0) for layer in layers} for _ in ROTATIONS]
        for half, of_half in enumerate(self.choose):
            for noise, (images, _) in zip(found, of_half, strict=True):
                for seen in output_gradients(self.model.net, layers, images):
                    for layer, x in seen.inputs.items():
                        for candidate, amax in offers[half][layer].items():
                            error = self._rounding(half, layer, amax)(x) - x
                            noise[layer][candidate] += output_noise(seen.gradients[layer], error)
        return found


def _added(parts: Sequence[Noise]) -> Noise:
    return {
        layer: {candidate: sum(part[layer][candidate] for part in parts) for candidate in of_layer}
        for layer, of_layer in parts[0].items()
    }


def _alternatives(noise: Noise, offers: Sequence[Offers], rule: str) -> dict[str, Picks]:
    """Return what may replace `rule`: the best candidate of every layer that clips no more than it does, or any."""

    def no_narrower(layer: str) -> list[str]:
        return [each for each in noise[layer] if all(of[layer][each] >= of[layer][rule] for of in offers)]

    return {
        f"{PER_LAYER}, no narrower than {rule}": {
            layer: min(no_narrower(layer), key=lambda each: of_layer[each]) for layer, of_layer in noise.items()
        },
        PER_LAYER: {layer: min(of_layer, key=lambda each: of_layer[each]) for layer, of_layer in noise.items()},
    }


class Search:
    """The choice of thresholds by some parts of the images; `offers`: by half, the same candidates for every layer."""

    def __init__(self, inputs: RoundedInputs, offers: Sequence[Offers], noise: Noise, parts: Sequence[int]) -> None:
        self.inputs, self.offers, self.parts = inputs, offers, parts
        rules = [rule for rule in next(iter(noise.values())) if rule not in NOT_FOR_ALL]
        foretold = {rule: sum(of_layer[rule] for of_layer in noise.values()) for rule in rules}
        measured = sorted(rules, key=lambda rule: foretold[rule])[:MEASURED_RULES]
        self.rule = self._best({rule: dict.fromkeys(noise, rule) for rule in measured})
        self.plain: Picks = dict.fromkeys(noise, self.rule)
        alternatives = _alternatives(noise, offers, self.rule)
        self.name = self._best(alternatives)
        self.picks = alternatives[self.name]

    def thresholds(self, picks: Picks) -> list[Thresholds]:
        """Return the thresholds of `picks` by half."""
        return [{layer: of_half[layer][pick] for layer, pick in picks.items()} for of_half in self.offers]

    def _best(self, choices: Mapping[str, Picks]) -> str:
        thresholds = [self.thresholds(picks) for picks in choices.values()]
        errors = self.inputs.errors(self.inputs.choose, self.parts, thresholds)
        return max(zip(choices, range(len(choices)), strict=True), key=lambda each: errors.db(each[1]))[0]


def search(inputs: RoundedInputs, offers: Sequence[Offers]) -> tuple[Picks, Gain, str]:
    """Return (candidate by layer, gain over the best rule, what was found).

    `offers`: by half, the same candidates for every layer.
    """
    alone = inputs.alone(offers)
    errors = Errors(2)
    for choose, judge in ROTATIONS:
        here = Search(inputs, offers, alone[choose], [choose])
        errors.merge(inputs.errors(inputs.judge, [judge], [here.thresholds(here.plain), here.thresholds(here.picks)]))
    found = Search(inputs, offers, _added(alone), [choose for choose, _ in ROTATIONS])
    gain = errors.gain(0, 1)
    if gain.holds:
        return found.picks, gain, f"'{found.name}' over '{found.rule}': {gain.text()}"
    return (
        found.plain,
        gain._replace(after_db=gain.before_db),
        f"'{found.rule}'; dropped: '{found.name}': {gain.text()}",
    )
