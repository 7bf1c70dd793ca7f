"""Rows of values that stand for named inputs: a network then takes one tensor per sample, as it takes images.

A row holds the values of all inputs one behind the other, flattened, in float32.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calib.errors import UserError, suggestion
from calib.inputs import Inputs


def separated(inputs: Inputs, rows: Tensor) -> dict[str, Tensor]:
    """Return `inputs` by name, (B, ...) each, of `rows` (B, N); floating ones keep the type of the rows."""
    parts = rows.split([one.size for one in inputs.each], 1)
    return {
        one.name: _typed(part.reshape(len(rows), *one.shape), one.dtype)
        for one, part in zip(inputs.each, parts, strict=True)
    }


def _typed(values: Tensor, dtype: str) -> Tensor:
    if dtype == "float32":
        return values
    return values != 0 if dtype == "bool" else values.to(getattr(torch, dtype))


class _SeparateInputs:
    """Hook before a forward pass: one tensor (B, N) becomes the named inputs; named inputs stay as they are."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    def __call__(
        self, _net: nn.Module, args: tuple[Any, ...], _kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        return ((), separated(self.inputs, args[0])) if args else None


def in_order(net: nn.Module, inputs: Inputs) -> Inputs:
    """Return `inputs` in the order of the parameters of the network's forward pass.

    Raises UserError for a name that is no parameter of it, and for a parameter that is missing.
    """
    kind, parameters = type(net).__name__, inspect.signature(net.forward).parameters
    given = {one.name: one for one in inputs.each}
    named = [name for name, each in parameters.items() if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    unknown = [name for name in given if name not in named]
    if unknown and not takes_any:
        raise UserError(
            f"{kind} takes no input '{unknown[0]}': expected arrays named as the parameters of its forward pass "
            f"({', '.join(named)}), or for a network of images INPUT=.{suggestion(unknown[0], named)}"
        )
    if missing := [name for name in named if name not in given and parameters[name].default is inspect.Parameter.empty]:
        raise UserError(
            f"{kind} needs an input '{missing[0]}', and there is no such array: expected {', '.join(named)}; there are "
            f"{', '.join(given)}"
        )
    return Inputs((*(given[name] for name in named if name in given), *(given[name] for name in unknown)))


def join_inputs(net: nn.Module, inputs: Inputs) -> None:
    """Let `net` and copies of it take one row of values (B, N) per sample as well as its `inputs` by name (edits `net`)."""
    net.register_forward_pre_hook(_SeparateInputs(inputs), with_kwargs=True)


def inputs_of(net: nn.Module) -> Inputs | None:
    """Return the inputs that `join_inputs` gave the network; None for a network of images."""
    hooks = (hook for hook in net._forward_pre_hooks.values() if isinstance(hook, _SeparateInputs))
    return next((hook.inputs for hook in hooks), None)


def separate_inputs(net: nn.Module, rows: Tensor) -> Tensor | Mapping[str, Tensor]:
    """Return the inputs of `net` by name from `rows` (B, N); for a network of images `rows` as they are."""
    inputs = inputs_of(net)
    return rows if inputs is None else separated(inputs, rows)


def arrays_from_rows(inputs: Inputs | None, rows: np.ndarray) -> np.ndarray | dict[str, np.ndarray]:
    """Return what a graph takes for `rows` (B, N): the inputs by name, or images as they are where `inputs` is None."""
    if inputs is None:
        return rows
    return {name: value.numpy() for name, value in separated(inputs, torch.from_numpy(rows)).items()}
