"""New points of a network where a tensor rounds to INT8, as many as the recipe allows: less accuracy for fewer bytes.

The network has a module at each point that passes the tensor on. The threshold there is the largest value that calibration
saw times a factor; what each factor does to the output, to first order (calib/judge/first_order.py), chooses it. The points
that cost least per value are taken while they lose no more than the budget together (calib/judge/budget.py).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from calib.grids import Grid
from calib.hooks import input_hooks
from calib.images.batches import ROTATIONS, Half, spread_images
from calib.judge.budget import Budget
from calib.judge.first_order import output_gradients, output_noise
from calib.judge.held_out import LARGEST_DB, Candidate
from calib.quant_model import QuantModel, StageRecord
from calib.quantizer import QParams, qparams_from_amax

# of the largest value that calibration saw; less gained little on DINOv2-S, and clips more of new images
FACTORS = (0.55, 0.65, 0.75, 1.0)
IMAGES = 8  # per part of a half

Points = Mapping[str, str]  # name of a point -> the module of the network that the tensor goes through there


@dataclass(frozen=True)
class Config:
    """What the points of one kind may cost."""

    max_loss_db: float = 0.5  # of SQNR at the network's output, all of them together

    def __post_init__(self) -> None:
        if not 0 <= self.max_loss_db <= LARGEST_DB:
            raise ValueError(f"max_loss_db {self.max_loss_db} is not a number from 0 to {LARGEST_DB:.0f}")


def reach(net: nn.Module, points: Points, half: Half) -> tuple[dict[str, float], dict[str, int]]:
    """Return (largest |value|, values per image) at each point, on all images of `half`."""
    names, largest = {module: name for name, module in points.items()}, dict.fromkeys(points, 0.0)
    values, images = dict.fromkeys(points, 0), 0

    def look(module: str, _module: nn.Module, x: Tensor) -> None:
        name = names[module]
        largest[name] = max(largest[name], float(x.abs().max()))
        values[name] += x.numel()

    with input_hooks(net, names, look), torch.inference_mode():
        for batch in half:
            images += len(batch)
            net(batch)
    return largest, {name: count // images for name, count in values.items()}


def noise_of(net: nn.Module, points: Points, largest: Mapping[str, float], images: Tensor) -> dict[str, list[float]]:
    """Return by point, for each of FACTORS, the squared error of the output if that tensor rounds, to first order."""
    found = {name: [0.0] * len(FACTORS) for name in points}
    grids = {
        name: [qparams_from_amax(torch.tensor(amax * factor)) for factor in FACTORS] for name, amax in largest.items()
    }
    for seen in output_gradients(net, list(points.values()), images):
        with torch.no_grad():
            for name, module in points.items():
                x, gradients = seen.inputs[module], seen.gradients[module]
                for index, grid in enumerate(grids[name]):
                    found[name][index] += float(output_noise(gradients, grid.fake_quantize(x) - x, seen.images))
    return found


Noise = Mapping[str, Sequence[float]]  # by point and factor


class RoundingPoints:
    """What rounding at each of `points` costs; `net`: the quantized network of `model` with the modules of the points.

    `quantizers`: what the grids of some points mean for the model.
    """

    def __init__(
        self,
        model: QuantModel,
        net: nn.Module,
        points: Points,
        halves: Sequence[Half],
        quantizers: Callable[[Mapping[str, QParams]], Mapping[str, Grid]],
    ) -> None:
        self.model, self.points, self.quantizers = model, points, quantizers
        seen = [reach(net, points, half) for half in halves]
        self.sizes = seen[0][1]
        self.by_half = [largest for largest, _ in seen]
        self.whole = {name: max(largest[name] for largest in self.by_half) for name in points}
        self.noise = [
            self._summed(
                [
                    noise_of(net, points, largest, spread_images(halves[index - 1].parts[part], IMAGES))
                    for index, largest in enumerate(self.by_half)
                ]
            )
            for part, _ in ROTATIONS
        ]
        self.together = self._summed(self.noise)

    def _summed(self, several: Sequence[Noise]) -> dict[str, list[float]]:
        return {name: [sum(each) for each in zip(*(one[name] for one in several), strict=True)] for name in self.points}

    def order(self, noise: Noise) -> tuple[list[str], dict[str, float]]:
        """Return (points, that with the least noise per value first; the noise of each at its best factor)."""
        cost = {name: min(each) for name, each in noise.items()}
        return sorted(self.points, key=lambda name: cost[name] / self.sizes[name]), cost

    def rounded(self, largest: Mapping[str, float], noise: Noise, names: Sequence[str]) -> QuantModel:
        """Return the model that rounds at `names`, each at the factor with the least noise."""
        best = {name: FACTORS[min(range(len(FACTORS)), key=noise[name].__getitem__)] for name in names}
        grids = {name: qparams_from_amax(torch.tensor(largest[name] * factor)) for name, factor in best.items()}
        return self.model.with_quantizers(self.quantizers(grids))

    def candidate(self, by_rotation: Sequence[Sequence[str]], names: Sequence[str]) -> Candidate:
        """Return the network that rounds at `names`, in the trials of rotation r at `by_rotation[r]`."""
        trials = tuple(
            tuple(self.rounded(largest, noise, of_rotation) for largest in self.by_half)
            for noise, of_rotation in zip(self.noise, by_rotation, strict=True)
        )
        return Candidate(f"{len(names)} of {len(self.points)}", trials, self.rounded(self.whole, self.together, names))


def within_budget(
    stage: str, what: str, config: Config, found: RoundingPoints, halves: Sequence[Half], start: float
) -> QuantModel:
    """Return the model that rounds at as many points as `config.max_loss_db` allows, with a record of `stage`.

    Where the images that judge show a loss over the budget it rounds at none, and is what it was. `what`: what the points
    are; `start`: when the stage began (seconds of `time.perf_counter`).
    """
    budget = Budget(found.model, halves, found.candidate, config.max_loss_db)
    names = budget.affordable(*found.order(found.together), range(len(ROTATIONS)))
    by_rotation = [budget.affordable(*found.order(noise), [index]) for index, noise in enumerate(found.noise)]
    candidate, errors, within = budget.judged(by_rotation, names)
    note = (
        f"{candidate.name} {what} in INT8: output SQNR {errors.db(1):.2f} dB against {errors.db(0):.2f} dB in FP16, on "
        f"held-out images"
    )
    record = StageRecord(
        stage,
        asdict(config),
        time.perf_counter() - start,
        errors.db(0),
        errors.db(1 if within else 0),
        (note if within else f"dropped, all stay in FP16: {note}",),
    )
    return (candidate.whole if within else found.model).with_record(record)
