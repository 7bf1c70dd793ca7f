"""The one judge: does a change to a network bring its output nearer to the float network's on held-out images?

A layer's own error does not tell: in a transformer a few huge activations decide it. So candidates are whole networks. Each
is fitted on either half of the calibration images and tried on the other, whose two parts (calib/images/batches.py) choose
among candidates and judge the choice, first one way round, then the other. In each of these rotations the images that fit,
choose and judge have no source image in common, and over both of them every source image judges once. What stays is fitted
on all images, with the choice that both parts together make. (A choice that both halves make together, such as a ridge,
compares fits of either half, so the images that judge one half's fit reach it indirectly, through the fit of the other.)

Gains are counted per source image, because crops of one source image are no independent evidence: a candidate has to gain
more than the standard error of its gain over source images, and at least `MARGIN_DB` on all of them together. Otherwise the
plainer candidate stays.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calib.images.batches import ROTATIONS, Half, spread_with_sources
from calib.judge.decibels import decibels
from calib.network.qdq import quantized_net
from calib.quant_model import QuantModel

IMAGES = 16  # per part that choose or judge
BATCH = 16
MARGIN_DB = 0.1  # a smaller gain is not worth a more complicated network
LARGEST_DB = 100.0  # stands for the gain over a source image where one of two networks has no error at all

Trials = tuple[tuple[QuantModel | None, ...], ...]


@dataclass(frozen=True)
class Candidate:
    """One way to quantize a network, fitted on all images (`whole`) and for each rotation and half.

    `trials[r][i]` is fitted on half i; part `ROTATIONS[r][0]` of the other half made its choices. None where that was not
    tried.
    """

    name: str
    trials: Trials
    whole: QuantModel

    @classmethod
    def unfitted(cls, name: str, model: QuantModel) -> "Candidate":
        """Return a candidate that takes nothing from the images, so that all trials are the same network."""
        return cls(name, ((model, model),) * len(ROTATIONS), model)

    @classmethod
    def unchosen(cls, name: str, by_half: Sequence[QuantModel | None], whole: QuantModel) -> "Candidate":
        """Return a candidate in which nothing is chosen: both rotations have `by_half[i]`, fitted on half i."""
        return cls(name, (tuple(by_half),) * len(ROTATIONS), whole)


class Offer(NamedTuple):
    """What a method offers: candidates, the plainest first, notes on how it got there and figures for the report."""

    candidates: list[Candidate]
    notes: tuple[str, ...] = ()
    details: dict[str, Any] = {}  # noqa: RUF012 - never written to


class Gain(NamedTuple):
    """Output SQNR (dB) before and after over all images; mean gain (dB) over source images and its standard error."""

    before_db: float
    after_db: float
    mean_db: float
    error_db: float
    sources: int

    @property
    def holds(self) -> bool:
        """Whether the gain is no chance; false, too, where a figure is not a number."""
        return self.after_db - self.before_db >= MARGIN_DB and self.mean_db > self.error_db

    def text(self) -> str:
        """Return one line for the report."""
        return (
            f"output SQNR {self.after_db:.2f} dB against {self.before_db:.2f} dB on calibration images that it was "
            f"not fitted on (mean gain by source image {self.mean_db:.2f} dB, standard error {self.error_db:.2f}, "
            f"{self.sources} source images)"
        )


Source = tuple[int, int, int]  # half, part, number within the part

Net = Callable[[Tensor], Tensor]


class Errors:
    """Squared output errors of several networks, by source image: what `Gain` is made from."""

    def __init__(self, count: int) -> None:
        self.signal = 0.0
        self.noise = [0.0] * count
        self.by_source: dict[Source, list[float]] = {}

    @torch.inference_mode()
    def add(self, exact: Net, nets: Sequence[Net], images: Tensor, sources: Sequence[Source]) -> None:
        """Run `nets` and the `exact` one on `images` (B, 3, H, W) of these source images."""
        for batch, of_batch in zip(images.split(BATCH), _split(sources, BATCH), strict=True):
            wanted = exact(batch).double()
            self.signal += float(wanted.square().sum())
            lost_by_net = {net: (net(batch) - wanted).square().flatten(1).sum(1).tolist() for net in {*nets}}
            for which, net in enumerate(nets):
                lost = lost_by_net[net]
                self.noise[which] += sum(lost)
                for source, one in zip(of_batch, lost, strict=True):
                    self.by_source.setdefault(source, [0.0] * len(nets))[which] += one

    def merge(self, other: "Errors") -> None:
        """Add the errors of `other`, of the same networks on other images or in another rotation."""
        self.signal += other.signal
        self.noise = [one + more for one, more in zip(self.noise, other.noise, strict=True)]
        for source, more in other.by_source.items():
            own = self.by_source.setdefault(source, [0.0] * len(self.noise))
            self.by_source[source] = [one + another for one, another in zip(own, more, strict=True)]

    def db(self, which: int) -> float:
        """Return the output SQNR (dB) of a network over all images."""
        return decibels(self.signal, self.noise[which])

    def gain(self, old: int, new: int) -> Gain:
        """Return what the network number `new` gains over the network number `old`."""
        gains = [_gain_db(of_source[old], of_source[new]) for of_source in self.by_source.values()]
        mean, count = statistics.fmean(gains), len(gains)
        squares = sum((each - mean) ** 2 for each in gains)  # statistics.stdev refuses what is not a number
        error = math.sqrt(squares / (count - 1) / count) if count > 1 else 0.0
        return Gain(self.db(old), self.db(new), mean, error, count)


def _gain_db(before: float, after: float) -> float:
    if before == after:
        return 0.0
    if not before or math.isinf(after):
        return -LARGEST_DB
    if not after or math.isinf(before):
        return LARGEST_DB
    return decibels(before, after)


def _split(values: Sequence[Source], size: int) -> list[Sequence[Source]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def add_errors(
    errors: Errors,
    candidates: Sequence[Candidate],
    rotation: int,
    part: int,
    halves: Sequence[Half],
    images: int = IMAGES,
) -> None:
    """Add the errors of the trials of one rotation on a `part` of the half that each was not fitted on.

    A half on which some candidate was not tried is left out.
    """
    for half in range(len(halves)):
        models = [each for each in (candidate.trials[rotation][half] for candidate in candidates) if each is not None]
        if len(models) < len(candidates):
            continue
        other = (half - 1) % len(halves)
        taken, numbers = spread_with_sources(halves[other].parts[part], images)
        nets = {id(model): quantized_net(model) for model in models}
        in_order = [nets[id(model)] for model in models]
        errors.add(models[0].float_net, in_order, taken, [(other, part, number) for number in numbers])


def plainest_best(errors: Errors) -> int:
    """Return the number of the best network, the plainest first: a later one has to hold its gain over it."""
    best = 0
    for index in range(1, len(errors.noise)):
        if errors.gain(best, index).holds:
            best = index
    return best


def choose(candidates: Sequence[Candidate], halves: Sequence[Half], images: int = IMAGES) -> tuple[list[int], int]:
    """Return (the number of the best candidate in each rotation, and over both), on the images that choose."""
    if len(candidates) == 1:
        return [0] * len(ROTATIONS), 0
    together, by_rotation = Errors(len(candidates)), []
    for rotation, (part, _) in enumerate(ROTATIONS):
        errors = Errors(len(candidates))
        add_errors(errors, candidates, rotation, part, halves, images)
        together.merge(errors)
        by_rotation.append(plainest_best(errors) if errors.by_source else 0)
    return by_rotation, plainest_best(together)


def held_out_errors(candidates: Sequence[Sequence[Candidate]], halves: Sequence[Half], images: int = IMAGES) -> Errors:
    """Return the errors of `candidates[r]`, for every rotation r, on the images that judge in it."""
    errors = Errors(len(candidates[0]))
    for rotation, (_, part) in enumerate(ROTATIONS):
        add_errors(errors, candidates[rotation], rotation, part, halves, images)
    return errors


def challenge(
    incumbent: Candidate, challengers: Sequence[Candidate], halves: Sequence[Half], images: int = IMAGES
) -> tuple[Candidate, Gain | None, str]:
    """Return (the candidate that stays, its gain over `incumbent`, what happened); no gain without challengers.

    In each rotation the best of `challengers` is chosen, then judged against `incumbent` on images that neither fitted nor
    chose it. Fitted on all images the choice must not be worse than `incumbent` either, which its trials do not promise.
    """
    if not challengers:
        return incumbent, None, ""
    by_rotation, best = choose(challengers, halves, images)
    chosen = challengers[best]
    whole = [Candidate.unfitted(each.name, each.whole) for each in (incumbent, chosen)]
    judged = [[incumbent, challengers[index], *whole] for index in by_rotation]
    errors = held_out_errors(judged, halves, images)
    gain, fitted = errors.gain(0, 1), errors.gain(2, 3)
    if not gain.holds:
        return incumbent, gain._replace(after_db=gain.before_db), f"dropped: {chosen.name}: {gain.text()}"
    if not fitted.after_db >= fitted.before_db:
        note = f"dropped: {chosen.name}: {gain.text()}, but fitted on all images {fitted.after_db:.2f} dB"
        return incumbent, gain._replace(after_db=gain.before_db), note
    return chosen, gain, f"{chosen.name}: {gain.text()}"
