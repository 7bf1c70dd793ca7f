"""QwT: a linear branch beside every quantized block gives back what rounding took, in closed form (Fu et al., 2024).

For block l with input x from the already compensated quantized network, in the order of the network (eq. 6):

    r = l_exact(x) - l_quant(x)        W, b = argmin sum |r - W x - b|^2        l_quant(x) + W x + b  from now on

What differs from the reference code, and why:
1. Sums in float64 with a shift (calib/moments.py) instead of a float32 inverse, which gave negative R2 on its training data.
2. A branch is judged on photographs it was not fitted on (K folds), in its FP16 form; the reference's test, R2 > 0 on the
   training data, can never fail for exact least squares.
3. A branch that does not pass is left out of the network instead of being filled with zeros.
4. `exact_net` is the target: switching the quantizers of the network itself off would give a wrong one, once a method has
   changed weights.
5. `target = "global"` aims at the float path from the images on instead: r = l_exact(x_exact) - l_quant(x), so that what one
   block leaves is the next one's to mend.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from calib.calibrate import Batches
from calib.moments import Moments, cross_validated_r2, pooled, r2
from calib.qdq import quantized_net
from calib.quant_model import Branch, QuantModel, StageRecord
from compensation.branch import BlockBranch
from compensation.carry import CARRIES, Carry
from compensation.chain import chain_shapes
from compensation.forms import FORMS, NoFitError
from compensation.layout import Layout, layout_from_shapes

FP16_MAX = 65504.0
LOSSLESS = 1e-12  # variance of r per sample below which there is nothing to mend


@dataclass(frozen=True)
class Config:
    """How branches are fitted, and when one is kept."""

    form: str = "dense"  # dense | diagonal | low_rank
    rank: int = 32  # of the low-rank form; the others ignore it
    target: str = "local"  # local: the exact block on the same input; global: the exact network's own path
    folds: int = 4  # contiguous parts of the images for cross-validation
    r2_min: float = 0.0  # a branch is kept if its cross-validated R2 is above this
    carry: str = "memory"  # memory | disk | recompute: where block inputs wait (compensation/carry.py)

    def __post_init__(self) -> None:
        for name, value, known in (
            ("form", self.form, FORMS), ("target", self.target, ("local", "global")), ("carry", self.carry, CARRIES)
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{name} '{value}' is not one of {', '.join(known)}")
        for name, number, least in (("folds", self.folds, 2), ("rank", self.rank, 1)):
            if number < least:
                raise ValueError(f"{name} is {number}: expected {least} or more")


class BlockSums:
    """All that is remembered of one block's samples: sums per fold and group, and what the official R2 of maps needs."""

    def __init__(self, layout: Layout, folds: int) -> None:
        self.layout = layout
        self.folds = [[Moments(layout.d_in, layout.d_out) for _ in range(layout.groups)] for _ in range(folds)]
        self.reach = torch.zeros(layout.groups, layout.d_in)  # largest |x| per channel
        self.images = 0
        self.position_sum: Tensor | float = 0.0

    def update(self, x: Tensor, r: Tensor, fold: int) -> None:
        """Add the images `x`, `r` (block input, what the branch should return) to `fold`."""
        rows = self.layout.input_rows(x)
        for moments, inputs, targets in zip(self.folds[fold], rows, self.layout.output_rows(r), strict=True):
            moments.update(inputs, targets)
        self.reach = torch.maximum(self.reach, torch.stack([group.abs().amax(0) for group in rows]))
        self.images += len(x)
        if not self.layout.channels_last:
            self.position_sum = self.position_sum + r.double().sum(0)

    def groups(self) -> list[Moments]:
        """The sums of all folds, per group."""
        return [pooled(group) for group in zip(*self.folds, strict=True)]

    def official_total(self, groups: Sequence[Moments]) -> float:
        """SS_tot of the reference code: for maps about the mean of every (c, h, w), else of every channel."""
        if self.layout.channels_last:
            return sum(group.total() for group in groups)
        assert isinstance(self.position_sum, Tensor)
        return float(sum(group.q.sum() for group in groups) - self.position_sum.square().sum() / self.images)


def fold_slices(index: int, batch: int, batches: int, folds: int) -> Iterator[tuple[int, slice]]:
    """(fold, images of it) within batch `index` of `batches`: folds are contiguous, as neighbours share a photograph."""
    fold_of = [(index * batch + image) * folds // (batches * batch) for image in range(batch)]
    for fold in sorted(set(fold_of)):
        yield fold, slice(fold_of.index(fold), fold_of.index(fold) + fold_of.count(fold))


def fp16_bound(branch: BlockBranch, reach: Tensor) -> float:
    """Largest |output| `branch` can have on inputs of at most `reach` (G, d_in)."""
    return max(
        float((fit.weight.abs() @ extent.double() + fit.bias.abs()).max())
        for fit, extent in zip(branch.fits(), reach, strict=True)
    )


def fit_branch(sums: BlockSums, config: Config) -> tuple[BlockBranch | None, dict[str, Any]]:
    """(the branch, or None if it is not worth its place; what was found, as plain values)."""
    layout, groups = sums.layout, sums.groups()
    total, samples = sum(group.total() for group in groups), groups[0].count
    found: dict[str, Any] = {"samples": int(samples), "groups": layout.groups, "stride": layout.stride}

    def fitted(parts: Sequence[Moments]) -> BlockBranch:
        return FORMS[config.form](parts, layout, config.rank)

    if total <= LOSSLESS * samples:
        return None, found | {"kept": False, "reason": "rounding changes nothing here"}
    try:
        branch = fitted(groups)
        r2_cv = cross_validated_r2(sums.folds, lambda parts: fitted(parts).fits())
    except (NoFitError, torch.linalg.LinAlgError) as refusal:
        return None, found | {"kept": False, "reason": str(refusal)}
    fits = branch.fits()
    error = sum(group.sse(fit.weight, fit.bias) for group, fit in zip(groups, fits, strict=True))
    found |= {
        "r2": r2(groups, fits),
        "r2_cv": r2_cv,
        "r2_official": 1 - error / sums.official_total(groups),
        "largest_weight": max(float(fit.weight.abs().max()) for fit in fits),
        "error_before": sum(float(group.q.sum()) for group in groups) / samples,  # squared, per sample
        "error_after": error / samples,
    }
    if (bound := fp16_bound(branch, sums.reach)) > FP16_MAX:
        return None, found | {"kept": False, "reason": f"outputs up to {bound:.0f} overflow FP16"}
    if not r2_cv > config.r2_min:
        return None, found | {"kept": False, "reason": f"cross-validated R2 {r2_cv:.3f} is not above {config.r2_min:g}"}
    return branch, found | {"kept": True, "reason": f"cross-validated R2 {r2_cv:.3f}"}


def _add_samples(
    sums: BlockSums, blocks: tuple[nn.Module, nn.Module], path: Carry, float_path: Carry | None, name: str, batches: int
) -> None:
    """One pass over the images: run block `name`, (exact, quantized), and add up what separates them.

    The exact block reads what the quantized one reads, or with `float_path` what it finds there.
    """
    exact, quantized = blocks
    float_calls = float_path.calls(name) if float_path else None
    for index, call in enumerate(path.calls(name)):
        float_call = next(float_calls) if float_calls else call
        target, output = float_call.run(exact), call.run(quantized)
        path.keep(index, output)
        if float_path:
            float_path.keep(index, target)
        for fold, part in fold_slices(index, len(call.x), batches, len(sums.folds)):
            sums.update(call.x[part], (target - output)[part], fold)


@torch.no_grad()
def compensate(model: QuantModel, images: Batches, config: Config) -> QuantModel:
    """`model` with a branch beside every block where it helps; those it had are replaced.

    `images` come with those of one photograph next to each other. Raises ValueError naming the blocks if they are no chain.
    """
    start = time.perf_counter()
    model = replace(model, branches={})
    names, net, exact = model.family.blocks(model.net), quantized_net(model), model.exact_net
    shapes = chain_shapes(net, names, next(iter(images)))
    layouts = {name: layout_from_shapes(name, *shapes[name], model.family.channels_last) for name in names}
    carry = CARRIES[config.carry]
    branches: dict[str, Branch] = {}
    details = []
    with carry(net, images) as path, carry(exact, images) as float_path:
        for name in names:
            sums, block = BlockSums(layouts[name], config.folds), net.get_submodule(name)
            pair = exact.get_submodule(name), block
            _add_samples(sums, pair, path, float_path if config.target == "global" else None, name, len(images))
            branch, found = fit_branch(sums, config)
            if branch is not None:
                branch.attach(block)
                branches[name] = branch
            path.advance(branch)
            float_path.advance(None)
            details.append({"block": name, **found})

    record = StageRecord(
        "qwt", asdict(config), time.perf_counter() - start, notes=_notes(details), details={"blocks": details}
    )
    return replace(model, branches=branches).with_record(record)


def _notes(details: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    kept = [found for found in details if found["kept"]]
    dropped = tuple(f"no branch at {found['block']}: {found['reason']}" for found in details if not found["kept"])
    if not kept:
        return (f"0 of {len(details)} blocks compensated", *dropped)
    worst, best = (reduce(pick, [found["r2_cv"] for found in kept]) for pick in (min, max))
    return (f"{len(kept)} of {len(details)} blocks compensated, cross-validated R2 {worst:.2f} to {best:.2f}", *dropped)
