"""The one judge: does a change to a network bring its output nearer to the float network's on held-out images?

A layer's own error does not tell: in a transformer a few huge activations decide it. So candidates are whole networks, each
fitted on either half of the calibration images and on all of them. Half of the other half chooses among candidates, the rest
judges the choice, once (calib/images/batches.py). Gains are counted per source image, because crops of one source image
are no independent evidence: a candidate has to gain more than the standard error of its gain over source images, and at
least `MARGIN_DB` on all of them together. Otherwise the plainer candidate stays.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calib.images.batches import Half, Part, spread_with_sources
from calib.judge.decibels import decibels
from calib.network.qdq import quantized_net
from calib.quant_model import QuantModel

IMAGES = 32  # per half that choose, and as many that judge
BATCH = 16
MARGIN_DB = 0.1  # a smaller gain is not worth a more complicated network
LARGEST_DB = 100.0  # stands for the gain over a source image where one of two networks has no error at all

CHOOSE, JUDGE = attrgetter("choose"), attrgetter("judge")


@dataclass(frozen=True)
class Candidate:
    """One way to quantize a network: `by_half[i]` fitted on half i alone (None where not tried), `whole` on all images."""

    name: str
    by_half: tuple[QuantModel | None, ...]
    whole: QuantModel

    @classmethod
    def unfitted(cls, name: str, model: QuantModel) -> "Candidate":
        """Return a candidate that takes nothing from the images, so that both halves give the same."""
        return cls(name, (model, model), model)


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
            f"output SQNR {self.after_db:.2f} dB against {self.before_db:.2f} dB on held-out images "
            f"(gain {self.mean_db:.2f} dB, standard error {self.error_db:.2f} over {self.sources} source images)"
        )


Net = Callable[[Tensor], Tensor]


class Errors:
    """Squared output errors of several networks, by source image: what `Gain` is made from."""

    def __init__(self, count: int) -> None:
        self.signal = 0.0
        self.noise = [0.0] * count
        self.by_source: dict[tuple[int, int], list[float]] = {}

    @torch.inference_mode()
    def add(self, exact: Net, nets: Sequence[Net], images: Tensor, sources: Sequence[tuple[int, int]]) -> None:
        """Run `nets` and the `exact` one on `images` (B, 3, H, W) of these source images."""
        for batch, of_batch in zip(images.split(BATCH), _split(sources, BATCH), strict=True):
            wanted = exact(batch).double()
            self.signal += float(wanted.square().sum())
            for which, net in enumerate(nets):
                lost = (net(batch) - wanted).square().flatten(1).sum(1).tolist()
                self.noise[which] += sum(lost)
                for source, one in zip(of_batch, lost, strict=True):
                    self.by_source.setdefault(source, [0.0] * len(nets))[which] += one

    def db(self, which: int) -> float:
        """Return the output SQNR (dB) of a network over all images."""
        return decibels(self.signal, self.noise[which])

    def gain(self, old: int, new: int) -> Gain:
        """Return what the network number `new` gains over the network number `old`."""
        gains = [_gain_db(of_source[old], of_source[new]) for of_source in self.by_source.values()]
        error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
        return Gain(self.db(old), self.db(new), statistics.fmean(gains), error, len(gains))


def _gain_db(before: float, after: float) -> float:
    if before == after:
        return 0.0
    if not before or not after:
        return LARGEST_DB if before else -LARGEST_DB
    return decibels(before, after)


def _split(values: Sequence[tuple[int, int]], size: int) -> list[Sequence[tuple[int, int]]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def errors_on(
    part: Callable[[Half], Part], candidates: Sequence[Candidate], halves: Sequence[Half], images: int = IMAGES
) -> Errors:
    """Return the errors of `candidates` on a part of the half that they were not fitted on.

    A half on which some candidate was not fitted is left out. `images` of each part are looked at.
    """
    errors = Errors(len(candidates))
    for index in range(len(halves)):
        models = [each for each in (candidate.by_half[index] for candidate in candidates) if each is not None]
        if len(models) < len(candidates):
            continue
        taken, sources = spread_with_sources(part(halves[index - 1]), images)
        nets = [quantized_net(model) for model in models]
        errors.add(models[0].float_net, nets, taken, [(index, source) for source in sources])
    return errors


def choose(candidates: Sequence[Candidate], halves: Sequence[Half], images: int = IMAGES) -> Candidate:
    """Return the best candidate, the plainest first, on the images that choose; a tie goes to the plainer one."""
    if len(candidates) == 1:
        return candidates[0]
    errors, best = errors_on(CHOOSE, candidates, halves, images), 0
    for index in range(1, len(candidates)):
        if errors.gain(best, index).holds:
            best = index
    return candidates[best]


def challenge(
    incumbent: Candidate, challengers: Sequence[Candidate], halves: Sequence[Half], images: int = IMAGES
) -> tuple[Candidate, Gain | None, str]:
    """Return (the candidate that stays, its gain over `incumbent`, what happened); no gain without challengers.

    The best of `challengers` is chosen, then judged against `incumbent` on images that neither fitted nor chose it. Fitted
    on all images it must not be worse than `incumbent` either, which its halves do not promise.
    """
    if not challengers:
        return incumbent, None, ""
    chosen = choose(challengers, halves, images)
    gain = errors_on(JUDGE, [incumbent, chosen], halves, images).gain(0, 1)
    if not gain.holds:
        return incumbent, gain._replace(after_db=gain.before_db), f"dropped: {chosen.name}: {gain.text()}"
    whole = [Candidate.unfitted(each.name, each.whole) for each in (incumbent, chosen)]
    fitted = errors_on(JUDGE, whole, halves, images).gain(0, 1)
    if not fitted.after_db >= fitted.before_db:
        note = f"dropped: {chosen.name}: {gain.text()}, but fitted on all images {fitted.after_db:.2f} dB"
        return incumbent, gain._replace(after_db=gain.before_db), note
    return chosen, gain, f"{chosen.name}: {gain.text()}"
