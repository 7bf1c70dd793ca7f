"""The outputs of a network by name, and as the one row of values per image that judges compare."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass, tree_flatten_with_path, tree_leaves

from calib.errors import UserError, first_line
from calib.task import BOXES, CLASSIFIER, FEATURES, PICTURES, TOKENS, VALUES, Task, boxes_of

SAME_REL_L2 = 1e-2  # of two runs; random weights can amplify float32's rounding, not to as much
NO_OUTPUT = 1e-6  # root mean square below which an output is nothing but rounding errors
OUTPUT = "output"  # the name of a single one


@dataclass(frozen=True)
class Output:
    """One output. `shape`: of one image, without the batch axis."""

    name: str
    shape: tuple[int, ...]


def _name(path: tuple[Any, ...]) -> str:
    """Return the name of an output at `path`: keys and fields as they are, numbers of a tuple behind "output"."""
    words = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    if words and words[0].isdigit():
        words.insert(0, OUTPUT)
    return re.sub(r"\W", "_", "_".join(words)) or OUTPUT


def register_dataclasses(returned: Any) -> None:
    """Tell torch of the dataclasses in what a network returned: unknown, they count as values, and none can be traced."""
    for value in tree_leaves(returned):
        if is_dataclass(value) and not isinstance(value, type):
            register_dataclass(type(value))
            register_dataclasses(value)


def named_outputs(returned: Any) -> dict[str, Tensor]:
    """Return the tensors of what a network returned, by name, in their order; what is no tensor is left out.

    A single tensor is called `OUTPUT`; keys of a dictionary and fields of a dataclass are names; those of a tuple are
    numbered from output_0.

    Raises UserError for two outputs of the same name.
    """
    register_dataclasses(returned)
    found: dict[str, Tensor] = {}
    for path, value in tree_flatten_with_path(returned)[0]:
        if isinstance(value, Tensor):
            name = _name(path)
            if name in found:
                raise UserError(f"the network returns two outputs named '{name}': expected different names")
            found[name] = value
    return found


class _JoinOutputs:
    """Hook behind a forward pass: the outputs become one row (B, N) per image, in which every output counts alike.

    Each output is divided by `sizes` (its root mean square) and flattened, so that squared differences of rows add up the
    outputs' noise relative to their signals. Unless `joined`, they are returned by name instead.
    """

    def __init__(self, sizes: Mapping[str, float]) -> None:
        self.sizes, self.joined = dict(sizes), True

    def __call__(self, _net: nn.Module, _args: tuple[Any, ...], returned: Any) -> Any:
        outputs = named_outputs(returned)
        if not self.joined:
            return outputs
        return torch.cat([value.flatten(1) / self.sizes[name] for name, value in outputs.items()], 1)


def _joining(net: nn.Module) -> _JoinOutputs | None:
    return next((hook for hook in net._forward_hooks.values() if isinstance(hook, _JoinOutputs)), None)


@contextmanager
def separate_outputs(net: nn.Module) -> Iterator[nn.Module]:
    """Let a network with joined outputs return them by name; any other network is left as it is."""
    hook = _joining(net)
    if hook:
        hook.joined = False
    try:
        yield net
    finally:
        if hook:
            hook.joined = True


def checked_outputs(net: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return what `net` computes of two or more `images` (B, 3, H, W), by name.

    Raises UserError unless all of them are floating-point tensors with one entry per image on their first axis.
    """
    kind = type(net).__name__
    with torch.no_grad(), separate_outputs(net):
        returned = net(images)
    found = named_outputs(returned)
    if not found:
        raise UserError(f"{kind} returns a {type(returned).__name__} without tensors: expected a tensor or several")
    for name, value in found.items():
        what = str(value.dtype).removeprefix("torch.")
        if value.is_floating_point() and value.dtype != torch.float32:
            raise UserError(f"{kind} returns {what} as '{name}': expected float32, without casts and autocast inside")
        if not value.is_floating_point():
            raise UserError(
                f"{kind} returns {what} numbers as '{name}': expected floating-point outputs only; leave what follows them "
                f"(argmax, sorting, choice of boxes) to the code behind the engine"
            )
        if value.ndim < 2 or len(value) != len(images):
            raise UserError(
                f"{kind} returns '{name}' of shape {tuple(value.shape)} for {len(images)} images: expected "
                f"({len(images)}, ...), one entry per image on the first axis"
            )
    return found


def _apart(value: Tensor, exact: Tensor) -> bool:
    """Whether an output differs by more than rounding can cause; what is not finite is examined elsewhere."""
    if value.shape != exact.shape:
        return True
    if not (value.isfinite().all() and exact.isfinite().all()):
        return False
    return float((value - exact).norm()) > SAME_REL_L2 * max(float(exact.norm()), NO_OUTPUT * exact.numel() ** 0.5)


def require_function_of_each(net: nn.Module, images: Tensor) -> None:
    """Raise UserError where `net` gives other outputs for the same `images` (B, 3, H, W) again, or for the first alone.

    Such a network is random, is not in eval mode, or mixes the images of a batch: no engine gives its outputs again.
    """
    kind = type(net).__name__
    with torch.no_grad(), separate_outputs(net):
        first, again = (named_outputs(net(images)) for _ in range(2))
        try:
            alone = named_outputs(net(images[:1]))
        except Exception as error:  # the network's own code may raise anything
            reason = f"{type(error).__name__}: {first_line(error, 200)}"
            raise UserError(f"{kind} fails on one sample alone ({reason})") from error
    for others, why in (
        (
            again,
            "when it runs on the same images again: expected eval mode without dropout or random numbers, and a forward "
            "pass that changes neither its input nor a buffer",
        ),
        (alone, "for one sample alone than beside another: expected outputs of each sample by itself"),
    ):
        for name, value in others.items():
            if _apart(value, first[name][: len(value)]):
                raise UserError(f"{kind} gives another '{name}' {why}")


def outputs_from(found: Mapping[str, Tensor]) -> tuple[Output, ...]:
    """Return the names and shapes of outputs that a network has computed."""
    return tuple(Output(name, tuple(value.shape[1:])) for name, value in found.items())


def outputs_of(net: nn.Module, images: Tensor) -> tuple[Output, ...]:
    """Return the outputs of `net` on two or more `images` (B, 3, H, W). Raises UserError as `checked_outputs` does."""
    return outputs_from(checked_outputs(net, images))


# an attribute by which a network says what it returns, the axes of that output (None: of any size), its form, the task
SAID: tuple[tuple[str, tuple[int | None, ...], str, str], ...] = (
    ("returns_tokens", (None, None), "(B, T, vocabulary)", TOKENS),
    ("returns_pictures", (3, None, None), "(B, 3, H, W)", PICTURES),
)


def _is(size: int, wanted: int | None) -> bool:
    return wanted is None or size == wanted


def task_of(net: nn.Module, outputs: tuple[Output, ...]) -> Task:
    """Return what the outputs are: logits of classes or of tokens, features, pictures, boxes, or values of any other kind.

    A network whose one output (B, 3, H, W) is a picture in 0..1 says so by its attribute `returns_pictures`; one whose one
    output (B, T, vocabulary) tells the token behind each of T places by `returns_tokens`; a detector says by `boxes` how its
    outputs become boxes. Raises UserError if what it says there does not fit its outputs.
    """
    described = getattr(net, "boxes", None)
    if described is not None and not isinstance(described, Tensor) and not callable(described):
        return Task(BOXES, boxes_of(described, {each.name: each.shape for each in outputs}, type(net).__name__))
    for attribute, wanted, form, task in SAID:
        said = getattr(net, attribute, None)
        if said is not None and not isinstance(said, bool):
            raise UserError(f"{type(net).__name__}.{attribute} is {said!r}: expected True or False")
        if said:
            (*others, shape) = (each.shape for each in outputs)
            if others or len(shape) != len(wanted) or not all(map(_is, shape, wanted)):
                found = ", ".join(f"{each.name} (B, {', '.join(map(str, each.shape))})" for each in outputs)
                raise UserError(
                    f"{type(net).__name__}.{attribute} is set: expected one output {form}, it returns {found}"
                )
            return Task(task)
    if len(outputs) > 1 or len(outputs[0].shape) > 1:
        return Task(VALUES)
    return Task(CLASSIFIER if int(getattr(net, "num_classes", None) or 0) > 0 else FEATURES)


def join_outputs(net: nn.Module, images: Tensor) -> None:
    """Let `net` and copies of it return one row of values per image, unless it has a single output (B, N) (edits `net`).

    The sizes of its outputs are those on `images` (B, 3, H, W).
    """
    with torch.no_grad():
        returned = net(images)
    if isinstance(returned, Tensor) and returned.ndim == 2:
        return
    sizes = {name: float(value.square().mean().sqrt()) or 1.0 for name, value in named_outputs(returned).items()}
    net.register_forward_hook(_JoinOutputs(sizes))
