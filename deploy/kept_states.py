"""What every stage of the torch half decided, kept under everything that decided it, so that later stages can run alone.

A state is named after the sha256 of the state before it, the stage's name and options, and the code and libraries that
ran; the first one after weights, images and seed. Any difference is another name, so a file is never out of date, only
unused. It holds decisions, not modules: channel scales that moved, quantizers, branches, records, and the numbers of the
network that the stage changed. Replayed on the network before the stage they give bit for bit what the stage gave. A file
that is damaged, or was made from something else than its name says, is not used.
"""

import contextlib
import copy
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib.grids import Grid, LogSqrt2, TwinUniform, Unrounded, WeightGroups
from calib.precision import Precision
from calib.quant_model import QuantModel, StageRecord
from calib.quantizer import QParams, dequantize, quantize
from calib.scales.equalise import apply_moves
from calib.store.checkpoint import UnusableError, read_state, write_state
from calib.store.provenance import ROOT, made_by
from calib.store.user_cache import trim
from calib.structure.moves import Moved
from compensation.branch import ConvBranch, DenseBranch, SharedBranch

# What decides a state beside calib/, and what writes it.
CODE = (
    ROOT / "compensation", ROOT / "deploy/stages.py", ROOT / "deploy/acceptance.py", ROOT / "deploy/measure", Path(__file__)
)  # fmt: skip
MOST_BYTES = 10_000_000_000  # of all states; those that were used longest ago go first
# Beside tensors and plain values a file may hold these and nothing else.
CLASSES = (
    QParams, LogSqrt2, TwinUniform, Unrounded, WeightGroups, Moved, Precision, StageRecord,
    DenseBranch, SharedBranch, ConvBranch,
)  # fmt: skip
GIVEN = ("name", "float_net", "structure")  # fields that no stage behind folding changes
BY_DIFFERENCE = ("net", "exact_net", "moved", "history")  # kept as what the stage changed; all others as they are


class _NoDecisionsError(Exception):
    """What a stage did that decisions do not describe."""


def _tensors(net: nn.Module) -> dict[str, Tensor]:
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    bits = [each.detach().cpu().contiguous().numpy().tobytes() for each in (one, other)]
    return bits[0] == bits[1]


def _grid_of(tensor: str, quantizers: Mapping[str, Grid]) -> QParams | None:
    """The uniform grid that the tensor called `tensor` may lie on."""
    layer, _, kind = tensor.rpartition(".")
    grid = quantizers.get(f"{layer}:{kind}")
    return grid if isinstance(grid, QParams) else None


def _packed(name: str, value: Tensor, quantizers: Mapping[str, Grid]) -> Tensor:
    """`value`, as int8 if it lies on the grid of its quantizer: a fourth of the bytes."""
    grid = _grid_of(name, quantizers)
    if grid is not None:
        integers = quantize(value, grid)
        if _same_bits(dequantize(integers, grid), value):
            return integers
    return value


def _changes(base: nn.Module, net: nn.Module, quantizers: Mapping[str, Grid]) -> dict[str, Tensor]:
    """The tensors of `net` that differ from those of `base` or are not there, by name; see `_packed`.

    Raises _NoDecisionsError if tensors are not all that differs.
    """
    if net is base:
        return {}
    before, after = _tensors(base), _tensors(net)
    kinds = [[(name, type(module)) for name, module in each.named_modules()] for each in (base, net)]
    if kinds[0] != kinds[1] or before.keys() - after.keys():
        raise _NoDecisionsError("it changed modules of the network")
    return {
        name: _packed(name, value.detach().clone(), quantizers)
        for name, value in after.items()
        if name not in before or not _same_bits(value, before[name])
    }


def _changed(base: nn.Module, changes: Mapping[str, Tensor], quantizers: Mapping[str, Grid]) -> nn.Module:
    """A copy of `base` with what `_changes` gave; `base` itself if that is nothing."""
    if not changes:
        return base
    net = copy.deepcopy(base)
    buffers = {name for name, _ in net.named_buffers()}
    for name, value in changes.items():
        grid = _grid_of(name, quantizers)
        numbers = dequantize(value, grid) if value.dtype == torch.int8 and grid is not None else value
        parent, _, child = name.rpartition(".")
        tensor = numbers if name in buffers else nn.Parameter(numbers, requires_grad=False)
        setattr(net.get_submodule(parent), child, tensor)
    return net


def _moved(model: QuantModel, net: nn.Module, moved: Sequence[Moved]) -> nn.Module:
    """`net`, one of the networks of `model`, with these channel scales moved."""
    return apply_moves(replace(model, net=net), moved).net if moved else net


def decisions(before: QuantModel, after: QuantModel) -> dict[str, Any]:
    """What the stage that made `after` of `before` decided. Raises _NoDecisionsError if that does not describe it."""
    if any(one is not other for one, other in zip(before.moved, after.moved, strict=False)):
        raise _NoDecisionsError("it took back channel scales")
    moved = after.moved[len(before.moved) :]
    one_net = after.exact_net is after.net
    names = [field.name for field in fields(after) if field.name not in (*GIVEN, *BY_DIFFERENCE)]
    return {
        "moved": moved,
        "records": after.history[len(before.history) :],
        "net": _changes(_moved(before, before.net, moved), after.net, after.quantizers),
        "exact_net": None
        if one_net
        else _changes(_moved(before, before.exact_net, moved), after.exact_net, after.quantizers),
        "fields": {name: getattr(after, name) for name in names},
    }


def replayed(before: QuantModel, state: Mapping[str, Any], note: str) -> QuantModel:
    """What the stage made of `before`, from its `decisions`, with `note` in its records; `before` is not changed."""
    moved, quantizers = state["moved"], state["fields"]["quantizers"]
    net = _changed(_moved(before, before.net, moved), state["net"], quantizers)
    exact_net = net
    if state["exact_net"] is not None:
        exact_net = _changed(_moved(before, before.exact_net, moved), state["exact_net"], quantizers)
    return replace(
        before,
        net=net,
        exact_net=exact_net,
        moved=(*before.moved, *moved),
        history=(*before.history, *(replace(each, notes=(*each.notes, note)) for each in state["records"])),
        **state["fields"],
    )


def _sha256(*values: Any) -> str:
    """Hex digest of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class KeptStates:
    """The states in `folder`; None: none is read or written."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.writable = folder is not None
        self.made_by = made_by(*CODE)

    def first_key(self, inputs: Mapping[str, Any]) -> str:
        """Of the state before all stages, which `inputs` (JSON values) decide."""
        return _sha256(inputs)

    def key(self, previous: str, stage: str, options: Any) -> str:
        """Of the state after `stage` with these options (a dataclass or None) on the state of the key `previous`."""
        return _sha256(previous, stage, options and asdict(options), self.made_by)

    def path(self, stage: str, key: str) -> Path | None:
        """The file of a state."""
        return self.folder and self.folder / f"{stage.replace(' ', '_')}.{key}.pt"

    def load(self, before: QuantModel, stage: str, key: str) -> tuple[QuantModel | None, str]:
        """(`before` after the stage, ""); (None, "") if nothing is kept, (None, why) if what is kept is not used."""
        path = self.path(stage, key)
        if path is None or not path.exists():
            return None, ""
        try:
            state = read_state(path, CLASSES, before.device)
            if state.get("key") != key:
                raise UnusableError("made from other inputs than its name says")
        except UnusableError as reason:
            return None, f"{path} is {reason}: not used"
        with contextlib.suppress(OSError):  # of another user, say
            os.utime(path)
        return replayed(before, state, f"taken from cache {key[:12]}"), ""

    def save(self, before: QuantModel, after: QuantModel, stage: str, key: str) -> str:
        """Keep what `stage` decided; returns what to tell the user, "" if that is nothing.

        A place that cannot be written is no error, and is told once.
        """
        path = self.path(stage, key)
        if path is None or not self.writable:
            return ""
        try:
            write_state(path, {"key": key, **decisions(before, after)})
            trim(path.parent, MOST_BYTES)
        except _NoDecisionsError as reason:
            return f"not kept: {reason}"
        except OSError as error:
            self.writable = False
            return f"not kept: {path.parent} cannot be written ({error.strerror})"
        return ""
