"""The calibration samples that branches are fitted on: all of them, or those where a named input has one value.

QwT fits the branches of a diffusion network at time step 0 alone, and they then serve every step (Fu et al., Quantization
without Tears, CVPR 2025, section on DiT).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from calib.errors import UserError, suggestion
from calib.images.batches import Half, Part
from calib.input_rows import inputs_of, separated


def _where(net: nn.Module, rows: Tensor, name: str, value: float) -> Tensor:
    """Whether the input `name` of each of the `rows` (B, N) has this value, (B,)."""
    inputs = inputs_of(net)
    if inputs is None:
        raise UserError(
            f"[compensate] only_input = '{name}': expected a network with named inputs, this one reads images"
        )
    given = separated(inputs, rows)
    if name not in given:
        names = list(given)
        raise UserError(
            f"[compensate] only_input = '{name}': expected one of {', '.join(names)}.{suggestion(name, names)}"
        )
    found = given[name].reshape(len(rows), -1)
    if found.shape[1] != 1:
        raise UserError(f"[compensate] only_input = '{name}' has {found.shape[1]} numbers per sample: expected one")
    return found[:, 0] == value


def samples_where(net: nn.Module, halves: Sequence[Half], name: str, value: float) -> list[Half]:
    """Return the `halves` with those samples alone whose input `name` of `net` has this value.

    Raises UserError where `net` has no such input of one number, or where a part has no such sample: fitting, choosing and
    judging take one part each.
    """

    def chosen(part: Part) -> Part:
        kept = [found for rows in part if len(found := rows[_where(net, rows, name, value)])]
        if not kept:
            raise UserError(
                f"[compensate] only_input = '{name}', only_value = {value:g}: one of the four parts of the calibration "
                f"samples has none with this value; expected some in each"
            )
        return Part(list(torch.cat(kept).split(max(len(rows) for rows in part))))

    return [Half((chosen(half.parts[0]), chosen(half.parts[1]))) for half in halves]
