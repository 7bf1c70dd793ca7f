"""Learning how layers round, so that what they compute comes near to the float network's.

A `Task` is what is learned together and by which loss: one block after another (BRECQ, Li et al., ICLR 2021), each reading
what the rounded network before it returns. (AdaQTransform's algorithm 1, Wen et al., ICLR 2025, learns all layers at once.)
The loss of an output is BRECQ's: |y^ - y|^2 summed over channels, mean over the rest.

Whatever is learned is looked at, rounded hard, on images that do not train; the best look is what remains, which may be the
start.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from calib.learned.learned_layer import ROUNDING, LearnedInput, LearnedLayer, Mode
from calib.learned.soft_rounding import beta_at, undecided
from calib.network.unit_io import readers_and_sizes, unit_io
from calib.quant_model import QuantModel
from calib.structure.in_front import replace_layer

LOOKS = 10  # at the images held out, in each phase
BATCH = 16  # images at a time where nothing trains

State = dict[str, Any]  # of a task that is being learned: all it takes to go on
Follow = Callable[[State, bool], None]


def _alone(state: State, looked: bool) -> None:
    """Nobody follows."""


@dataclass(frozen=True)
class Phase:
    """Quantities (calib/learned/learned_layer.py) that learn together, for a share of the steps."""

    learned: tuple[str, ...]
    share: float = 1.0
    exact_inputs: bool = False  # inputs do not round meanwhile


@dataclass(frozen=True)
class Schedule:
    """How long and how fast."""

    iterations: int
    batch: int
    rounding_rate: float  # of Adam, for alpha
    step_rate: float  # of Adam at the start, for all else; a cosine brings it to 0
    regulariser: float
    drop: float  # see Mode


@dataclass(frozen=True)
class Task:
    """Layers that learn together. `loss`: of the training images with these indices; `held_out`: of other images."""

    layers: Mapping[str, LearnedLayer]
    mode: Mode
    count: int
    loss: Callable[[Tensor], Tensor]
    held_out: Callable[[], float]
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))


def channel_loss(y: Tensor, target: Tensor) -> Tensor:
    """|y - target|^2 summed over channels, mean over the rest: maps (B, C, H, W), tokens (B, N, C) or vectors (B, C)."""
    channels = y.shape[1] if y.ndim == 4 else y.shape[-1]
    return (y - target).square().mean() * channels


def cosine(step: int, steps: int) -> float:
    """1 at step 0, 0 at `steps`."""
    return (1 + math.cos(math.pi * step / steps)) / 2


def _parameters(layers: Mapping[str, LearnedLayer], rounding: bool) -> list[nn.Parameter]:
    """What learns of `layers`: alpha, or all else; inputs that layers share once."""
    found = {
        id(parameter): parameter
        for layer in layers.values()
        for name, parameter in layer.quantities().items()
        if parameter.requires_grad and (name == ROUNDING) == rounding
    }
    return list(found.values())


def _values(task: Task) -> list[Tensor]:
    return [value.detach().clone() for layer in task.layers.values() for value in layer.quantities().values()]


@torch.no_grad()
def _restore(task: Task, values: Sequence[Tensor]) -> None:
    parameters = [parameter for layer in task.layers.values() for parameter in layer.quantities().values()]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


@torch.no_grad()
def _look(task: Task) -> float:
    task.mode.soft = False
    return task.held_out()


def _undecided(task: Task, beta: float) -> Tensor:
    return torch.stack([undecided(layer.h(), beta) for layer in task.layers.values()]).sum()


def _begun(task: Task) -> State:
    """The state of a task of which nothing is learned yet."""
    loss = _look(task)
    values = _values(task)
    return {"phase": 0, "step": 0, "before": loss, "least": loss, "best": values, "values": values}


def _learn(task: Task, phase: Phase, schedule: Schedule, steps: int, state: State, follow: Follow) -> None:
    """`steps` steps of Adam on what `phase` learns, looking `LOOKS` times, last at the end; `state` is kept up to date."""
    for layer in task.layers.values():
        layer.learn(phase.learned)
    alphas, others = (_parameters(task.layers, rounding) for rounding in (True, False))
    if not alphas and not others:
        return
    optimiser = torch.optim.Adam(
        [{"params": alphas, "lr": schedule.rounding_rate}, {"params": others, "lr": schedule.step_rate}]
    )
    if state["step"]:
        optimiser.load_state_dict(state["optimiser"])
        task.generator.set_state(state["generator"])
    task.mode.exact_inputs = phase.exact_inputs
    for step in range(state["step"], steps):
        task.mode.soft = True
        loss = task.loss(torch.randperm(task.count, generator=task.generator, device="cpu")[: schedule.batch])
        if alphas and (beta := beta_at(step / steps)):
            loss = loss + schedule.regulariser * _undecided(task, beta)
        optimiser.param_groups[1]["lr"] = schedule.step_rate * cosine(step, steps)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        for layer in task.layers.values():
            layer.keep_positive()
        looked = (step + 1) * LOOKS // steps > step * LOOKS // steps
        if looked:
            if (found := _look(task)) < state["least"]:
                state |= {"least": found, "best": _values(task)}
            state |= {
                "step": step + 1, "values": _values(task), "optimiser": optimiser.state_dict(),
                "generator": task.generator.get_state(),
            }  # fmt: skip
        follow(state, looked)


def steps_of(phase: Phase, iterations: int) -> int:
    """How many steps of Adam a phase has."""
    return max(1, round(phase.share * iterations))


def reconstruct(
    task: Task, phases: Sequence[Phase], schedule: Schedule, state: State | None = None, follow: Follow = _alone
) -> tuple[float, float]:
    """Teach the layers of `task` phase by phase; (loss on images held out at the start, at the best look, which remains).

    `follow` gets, after each step, the state at the last look, and whether that was now; with a `state` that it got, an
    interrupted task goes on to the same numbers.
    """
    task.mode.drop, task.mode.generator = schedule.drop, task.generator
    state = state or _begun(task)
    _restore(task, state["values"])
    for index in range(state["phase"], len(phases)):
        _learn(task, phases[index], schedule, steps_of(phases[index], schedule.iterations), state, follow)
        state |= {"phase": index + 1, "step": 0, "values": state["best"], "optimiser": None}
        _restore(task, state["best"])
    task.mode.soft = False
    for layer in task.layers.values():
        layer.learn(())
    return state["before"], state["least"]


def put_learned_layers(
    running: nn.Module, start: QuantModel, layers: Sequence[str], run: Callable[[], object], nearest: bool
) -> tuple[dict[str, LearnedLayer], Mode]:
    """Put learned layers in place of `layers` of `running`, a rounded copy of `start.net` (edits it); `run` runs them."""
    groups, sizes = readers_and_sizes(running, layers, run)
    mode, found = Mode(), dict[str, LearnedLayer]()
    for group in groups:
        reads = LearnedInput(start.quantizers[f"{group[0]}:input"], mode)
        for name in group:
            layer, params = start.net.get_submodule(name), start.qparams(f"{name}:weight")
            found[name] = LearnedLayer(layer, params, reads, mode, nearest, sizes[name])
            replace_layer(running, name, found[name])
    return found, mode


def _sampled(one: Tensor, other: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Elements of `one`, a `share` of them replaced by those of `other`."""
    if not share:
        return one
    return torch.where(torch.rand(one.shape, generator=generator, device="cpu").to(one.device) < share, other, one)


def block_task(
    running: nn.Module, model: QuantModel, start: QuantModel, unit: str, layers: Sequence[str], images: Tensor,
    held_out: Tensor, nearest: bool,
) -> Task:  # fmt: skip
    """Teach `layers`, all in the submodule `unit`, to return what it does in the float network, reading what it gets here.

    `start`: `model` with the grids and biases that learning starts from. `running`: a rounded copy of it, complete up to
    `unit`; its layers are replaced (edits it).
    """
    exact, given = (unit_io(net, unit, images.split(BATCH)) for net in (model.net, running))
    judged = unit_io(model.net, unit, held_out.split(BATCH)).outputs
    read = unit_io(running, unit, held_out.split(BATCH)).inputs
    found, mode = put_learned_layers(
        running, start, layers, lambda: given.run(running.get_submodule(unit), given.inputs[:BATCH]), nearest
    )
    module, generator = running.get_submodule(unit), torch.Generator().manual_seed(0)

    def loss(indices: Tensor) -> Tensor:
        x = _sampled(given.inputs[indices], exact.inputs[indices], mode.drop, generator)
        return channel_loss(given.run(module, x), exact.outputs[indices])

    def error() -> float:
        pairs = zip(read.split(BATCH), judged.split(BATCH), strict=True)
        return sum(len(x) * float(channel_loss(given.run(module, x), y)) for x, y in pairs) / len(read)

    return Task(found, mode, len(images), loss, error, generator)
