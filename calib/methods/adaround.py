"""AdaRound with AdaQTransform: the rounding of weights, their steps, biases and the steps of inputs are learned together.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020; Wen et al., "From Decoupling to
Adaptive Transformation: a Wider Optimization Space for PTQ" (AdaQTransform), ICLR 2025. With the weight's step frozen to the
least squared error (eq. 1), each block learns which of its two neighbours every weight takes, a gain xi and an offset eta
per output channel and the step of each input (eq. 8), so that the block returns what it does in the float network. All of
it folds into integers, scales and biases: an engine runs the same kernels.

Which steps learn is the paper's Table 1, here `CASES`. Its authors published no code. Chosen here: xi, eta and the steps
learn relative to their size, and all rates are raised where there are fewer than the published 20 000 iterations.

One half of the calibration images trains. One part of the other half chooses the best of ten moments of each block's
training, its other part judges the network's output in the end. There is no second rotation: training is long.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from calib.images.batches import Half, spread_images
from calib.judge.held_out import Candidate, Offer
from calib.learned.learned_layer import DEQUANT_SCALE, INPUT_SCALE, OFFSET, QUANT_SCALE, ROUNDING, SCALE, LearnedLayer
from calib.learned.reconstruction import (
    Follow,
    Phase,
    Schedule,
    State,
    Task,
    block_task,
    reconstruct,
    steps_of,
)
from calib.learned.weight_scales import least_squares_qparams
from calib.methods import rtn
from calib.network.qdq import quantized_net
from calib.network.rounded_layer import require_whole_channels, with_layers
from calib.precision import UNROUNDED
from calib.quant_model import QuantModel
from calib.quantizer import QParams, largest_integer
from calib.store.checkpoint import Checkpoint
from calib.store.kept_files import nets_sha256, tensors_sha256
from calib.store.watch import UNWATCHED, Watch

# Table 1: what learns, and when
CASES = {
    "1.1.1": (Phase((ROUNDING,), share=0.8, exact_inputs=True), Phase((INPUT_SCALE,), share=0.2)),  # AdaRound, BRECQ
    "1.1.2": (Phase((ROUNDING, INPUT_SCALE)),),  # QDrop, NWQ
    "1.2": (Phase((SCALE, INPUT_SCALE)),),  # LSQ: to nearest, with one step
    "2.1": (Phase((ROUNDING, QUANT_SCALE, INPUT_SCALE)),),
    "2.2": (Phase((ROUNDING, DEQUANT_SCALE, INPUT_SCALE)),),  # AdaQTransform
    "2.3": (Phase((ROUNDING, QUANT_SCALE, DEQUANT_SCALE, INPUT_SCALE)),),
}
PUBLISHED_ITERATIONS = 20_000
CROSSING = 2.0  # how far Adam must be able to move alpha: h leaves 0 at -2.4 and reaches 1 at 2.4
FASTEST = 0.25  # of an integer that the largest weight or input moves by, at every iteration
HELD_OUT = 32  # images that judge a block while it learns
SAVE_EVERY = 60.0  # seconds between checkpoints


@dataclass(frozen=True)
class Config:
    """What learns, and for how long; the paper takes 20 000 iterations of 32 images out of 1024."""

    case: str = "2.2"  # of AdaQTransform's Table 1: 1.1.1 | 1.1.2 (AdaRound) | 1.2 (LSQ) | 2.1 | 2.2 | 2.3
    offset: bool = True  # biases learn too: with case 2.2 this is AdaQTransform
    input_steps: bool = True  # the steps of inputs learn, in the cases that have them
    drop: float = 0.0  # probability of each input element not to round while learning; QDrop: 0.5
    iterations: int = 100  # per block
    batch: int = 16  # images per iteration
    images: int = 128  # that train, spread over the source images; what blocks read and return of them stays in memory
    regulariser: float = 0.01  # weight of the push to 0 or 1 (BRECQ: 0.01, MobileNet-v2 0.1, MnasNet 0.2)
    rounding_rate: float = 1e-3  # of Adam for alpha, more if iterations are few
    step_rate: float = 4e-5  # of Adam at the start for steps, gains and offsets; for 20 000 iterations, more for fewer

    def __post_init__(self) -> None:
        if self.case not in CASES:
            raise ValueError(f"case '{self.case}' is not one of {', '.join(CASES)}")
        for name in ("iterations", "batch", "images"):
            if (number := getattr(self, name)) < 1:
                raise ValueError(f"{name} {number} is not a positive number")
        for name in ("regulariser", "rounding_rate", "step_rate"):
            if not 0 <= (number := getattr(self, name)) < float("inf"):
                raise ValueError(f"{name} {number} is not a number of at least 0")
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop {self.drop} is not a probability below 1")

    def phases(self) -> tuple[Phase, ...]:
        """What learns, and when; the offset in the last phase."""
        *first, last = CASES[self.case]
        phases = (*first, replace(last, learned=(*last.learned, *((OFFSET,) if self.offset else ()))))
        without = () if self.input_steps else (INPUT_SCALE,)
        learned = [tuple(name for name in each.learned if name not in without) for each in phases]
        return tuple(replace(each, learned=names) for each, names in zip(phases, learned, strict=True))

    def schedule(self, bits: int) -> Schedule:
        """Iterations, and rates that let alpha cross over and steps of `bits` bits get as far as with the published."""
        rounding_rate = max(self.rounding_rate, CROSSING / self.iterations)
        fastest = max(FASTEST / largest_integer(bits), self.step_rate)
        step_rate = min(self.step_rate * PUBLISHED_ITERATIONS / self.iterations, fastest)
        return Schedule(self.iterations, self.batch, rounding_rate, step_rate, self.regulariser, self.drop)


def least_squares_quantizers(model: QuantModel) -> dict[str, QParams]:
    """A `:weight` quantizer for every layer to be quantized, of the steps that learning starts from.

    Raises UserError where weights round in groups.
    """
    require_whole_channels(model)
    return {
        f"{name}:weight": least_squares_qparams(model.net.get_parameter(f"{name}.weight"), model.bits(name).weight)
        for name in model.layers
    }


def units(model: QuantModel) -> dict[str, list[str]]:
    """Layers to be quantized by the block they are in; a layer outside all blocks is its own."""
    blocks = model.structure.blocks
    found: dict[str, list[str]] = {}
    for name in model.layers:
        found.setdefault(next((block for block in blocks if name.startswith(f"{block}.")), name), []).append(name)
    return found


def tasks(
    model: QuantModel, start: QuantModel, images: Tensor, held_out: Tensor, config: Config
) -> Iterator[tuple[int, Task]]:
    """Yield (number of tasks, task) block by block, each to be learned before the next. `start`: `model`, rounded."""
    running = quantized_net(start)
    to_nearest = not any(ROUNDING in phase.learned for phase in config.phases())
    by_unit = units(model)
    for unit, layers in by_unit.items():
        yield len(by_unit), block_task(running, model, start, unit, layers, images, held_out, to_nearest)


def most_bits(model: QuantModel, layers: Iterable[str]) -> int:
    """That weights or inputs of `layers` round to."""
    given = [model.bits(name) for name in layers]
    return max(bits for each in given for bits in (each.weight, each.input) if bits != UNROUNDED)


class Course:
    """Where learning all tasks stands: the states of those begun, kept every `SAVE_EVERY` seconds."""

    def __init__(self, checkpoint: Checkpoint, watch: Watch, steps: int) -> None:
        self.checkpoint, self.watch, self.steps = checkpoint, watch, steps
        kept = checkpoint.load() or {"states": [], "done": 0}
        self.states: list[State] = kept["states"]
        self.done, self.saved = int(kept["done"]), time.monotonic()

    def follow(self, index: int, count: int) -> Follow:
        """What takes the states of the task `index` of `count`."""

        def at(state: State, looked: bool) -> None:
            self.done += 1
            self.states[index:] = [state]
            if looked and time.monotonic() - self.saved >= SAVE_EVERY:
                self.checkpoint.save({"states": self.states, "done": self.done})
                self.saved = time.monotonic()
            self.watch.at(self.done, count * self.steps)

        return at

    def state(self, index: int) -> State | None:
        """Of a task that was begun before an interruption."""
        return self.states[index] if index < len(self.states) else None


def learned_layers(
    model: QuantModel, start: QuantModel, images: Tensor, held_out: Tensor, config: Config, course: Course
) -> Iterator[tuple[dict[str, LearnedLayer], float, float]]:
    """(layers, loss on the images held out before and after) of each task, taught in turn. `start`: `model`, rounded."""
    phases = config.phases()
    for index, (count, task) in enumerate(tasks(model, start, images, held_out, config)):
        schedule = config.schedule(most_bits(model, task.layers))
        yield (
            dict(task.layers),
            *reconstruct(task, phases, schedule, course.state(index), course.follow(index, count)),
        )


def _description(
    model: QuantModel, start: QuantModel, images: Tensor, held_out: Tensor, config: Config
) -> dict[str, Any]:
    """What decides the run, so that a checkpoint of it is found."""
    return {
        "options": asdict(config),
        "model": nets_sha256({"exact": model.net, "start": quantized_net(start)}),
        "images": tensors_sha256({"images": images, "held_out": held_out}),
    }


def candidates(
    model: QuantModel, plain: Candidate, halves: Sequence[Half], config: Config, watch: Watch = UNWATCHED,  # noqa: ARG001 - the interface of all methods
) -> Offer:  # fmt: skip
    """Offer `model` with its rounding learned on the first half, block by block.

    Interrupted, the same call goes on from the checkpoint of `watch`, to the same numbers as without the interruption.
    """
    images = spread_images(halves[0], config.images)
    held_out = spread_images(halves[1].parts[0], HELD_OUT)
    begun = model.with_quantizers(least_squares_quantizers(model))
    start = rtn.with_corrected_biases(begun, rtn.mean_inputs(begun, halves[:1])[0])
    checkpoint = watch.checkpoint("adaround", lambda: _description(model, start, images, held_out, config))
    course = Course(checkpoint, watch, sum(steps_of(phase, config.iterations) for phase in config.phases()))
    found: dict[str, LearnedLayer] = {}
    better = count = 0
    for layers, before, after in learned_layers(model, start, images, held_out, config, course):
        found |= layers
        better, count = better + (after < before), count + 1
    checkpoint.remove()
    inputs = {f"{name}:input": layer.reads.grid for name, layer in found.items()}
    tuned = with_layers(model.with_quantizers(inputs), {name: layer.rounded() for name, layer in found.items()})
    notes = (
        f"{better} of {count} blocks learned, {config.iterations} iterations of {min(config.batch, len(images))} of "
        f"{len(images)} images each; the others round with the least squared error",
        *checkpoint.notes,
    )
    return Offer([Candidate(f"case {config.case}", ((tuned, None), (None, None)), tuned)], notes)
