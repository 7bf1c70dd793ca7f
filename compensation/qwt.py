"""QwT: a linear branch beside every quantized block compensates for its quantization error, in closed form.

Fu et al., "Quantization without Tears", CVPR 2025. For block l with input x from the already compensated quantized network,
in the order of the network (eq. 6):

    r = l_exact(x) - l_quant(x)        W, b = argmin sum |r - W x - b|^2        l_quant(x) + W x + b  from now on

What differs from the reference code, and why:
1. Sums are in float64 with a shift (compensation/moments.py) instead of a float32 inverse, which gave a negative R2 on its
   own training data. At most `rows` samples per block and half enter them; the paper takes all tokens.
2. The ridge is the one of `ridges` whose fit on one half of the images has the least error on the other half; the paper has
   none.
3. A branch is kept if it lowers the error on images it was not fitted on, with the numbers that run (FP16, INT8). The
   reference's test, R2 > 0 on the training data, can never fail for exact least squares. All branches together are then
   judged by the network's output (calib/judge/held_out.py).
4. A branch that is not kept is absent instead of being filled with zeros.
5. `exact_net` is the target: switching the quantizers of the network itself off would give a wrong one, once a method has
   changed weights.
6. The form is chosen per block by the error it removes and what it costs (compensation/select.py); shared forms cost no
   kernel. Without the branches that do not lower the network's output error is a candidate of its own
   (compensation/leave_out.py); of the two, the one with fewer kernels is the plainer, else the one with all branches.
7. The images are those that scales and weights were fitted on; the paper takes 512 others.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from calib.hooks import input_hooks
from calib.images.batches import ROTATIONS, Half
from calib.judge.held_out import Candidate, Offer
from calib.network.fp16_range import FP16_MAX
from calib.network.qdq import quantized_net
from calib.quant_model import Branch, QuantModel
from calib.quantizer import QParams
from compensation.branch import BlockBranch, engine_bytes
from compensation.carry import Call, Carry
from compensation.fitted_on import samples_where
from compensation.forms import FORMS, NoFitError, Place
from compensation.leave_out import worth_keeping
from compensation.moments import Moments, pooled, r2
from compensation.places import Places, places
from compensation.select import UNLIMITED, Option, front, select

LOSSLESS = 1e-12  # variance of r per sample below which there is nothing to compensate
Forms = tuple[str, ...]


@dataclass(frozen=True)
class Config:
    """How branches are fitted, and when one is kept."""

    forms: Forms = ("shared", "shared_mlp", "dense")  # tried at every block: see FORMS
    rows: int = 65536  # samples per block and half; more tokens than that are thinned out evenly
    ridges: tuple[float, ...] = (0.0, 0.003, 0.03, 0.3, 3.0)  # tried, on channels of unit power; 0 is the paper's
    min_r2_per_kernel: float = 0.05  # share of its block's error that a branch must remove for every kernel it adds
    max_extra_kernels: int = UNLIMITED  # of all branches together
    max_extra_bytes: int = UNLIMITED
    # a named input of one number, and the value at which samples fit the branches: all samples judge; "": all fit, too
    only_input: str = ""
    only_value: float = 0.0

    def __post_init__(self) -> None:
        if self.only_value and not self.only_input:
            raise ValueError(
                f"only_value is {self.only_value:g} without only_input: expected the name of an input there"
            )
        if not self.ridges or min(self.ridges) < 0:
            raise ValueError(f"ridges {self.ridges} are not numbers of at least 0")
        for form in self.forms:
            if form not in FORMS:
                raise ValueError(f"form '{form}' is not one of {', '.join(FORMS)}")
        if self.rows < 1:
            raise ValueError(f"rows is {self.rows}: expected 1 or more")

    @property
    def limits(self) -> tuple[int, int]:
        """Return the most kernels and bytes of all branches together."""
        return self.max_extra_kernels, self.max_extra_bytes


class BlockSums:
    """What is remembered of one block's samples: sums per part of the images and group, and those of the official R2.

    Parts come in pairs, one pair per half.
    """

    def __init__(self, place: Place, parts: int) -> None:
        layout = place.layout
        self.place, self.layout = place, layout
        self.parts = [[Moments(layout.d_in, layout.d_out) for _ in range(layout.groups)] for _ in range(parts)]
        self.reach = torch.zeros(layout.groups, layout.d_in)  # largest |x| per channel
        self.images = 0
        self.power = 0.0  # sum of all r^2, and of the images per (c, h, w), of maps
        self.position_sum = torch.zeros(1, 1, 1, dtype=torch.float64)

    def update(self, x: Tensor, r: Tensor, part: int, step: int = 1) -> None:
        """Add every `step`-th sample of the images `x`, `r` (what is read, what the branch should return) to `part`."""
        rows = self.layout.input_rows(x)
        for moments, inputs, targets in zip(self.parts[part], rows, self.layout.output_rows(r), strict=True):
            moments.update(inputs[::step], targets[::step])
        self.reach = torch.maximum(self.reach, torch.stack([group.abs().amax(0) for group in rows]))
        self.images += len(x)
        if not self.layout.channels_last:
            self.power += float(r.square().sum(dtype=torch.float64))
            self.position_sum = self.position_sum + r.sum(0, dtype=torch.float64)

    def groups(self) -> list[Moments]:
        """Return the sums of all images, per group."""
        return [pooled(group) for group in zip(*self.parts, strict=True)]

    def halves(self) -> list[list[Moments]]:
        """Return the sums of each half, per group."""
        pairs = zip(self.parts[::2], self.parts[1::2], strict=True)
        return [[pooled(group) for group in zip(*pair, strict=True)] for pair in pairs]

    def held_out_r2(self, branches: Sequence[BlockBranch], parts: Sequence[int]) -> float:
        """Return the R2 of branches fitted on each half, on `parts` of the other half."""
        error = total = 0.0
        tried: list[list[Moments]] = []
        for index, branch in enumerate(branches):
            other = (index - 1) % len(branches)
            for groups in (self.parts[2 * other + part] for part in parts):
                tried.append(groups)
                error += sum(group.sse(fit.weight, fit.bias) for group, fit in zip(groups, branch.fits(), strict=True))
        total = sum(pooled(group).total() for group in zip(*tried, strict=True))
        return 1 - error / total if total > 0 else 0.0

    def official_r2(self, error: float, groups: Sequence[Moments]) -> float:
        """Return the R2 of the reference code: for maps about the mean of every (c, h, w), else of every channel.

        `error`: squared, of the samples kept; where maps were thinned out it is scaled to all of their positions.
        """
        if self.layout.channels_last:
            return 1 - error / sum(group.total() for group in groups)
        positions = self.images * self.position_sum[0].numel()
        total = self.power - float(self.position_sum.square().sum()) / self.images
        return 1 - error * positions / groups[0].count / total


def fp16_bound(branch: BlockBranch, reach: Tensor) -> float:
    """Largest |output| `branch` can have on inputs of at most `reach` (G, d_in)."""
    return max(
        float((fit.weight.abs() @ extent.double() + fit.bias.abs()).max())
        for fit, extent in zip(branch.fits(), reach, strict=True)
    )


@dataclass(frozen=True)
class Tried:
    """A form at one block: branches fitted on each half, with the ridge that some parts of the images choose.

    `r2`: on these parts, of branches fitted on the other half.
    """

    by_half: tuple[BlockBranch, ...]
    ridge: float
    r2: float


@dataclass(frozen=True)
class Fitted:
    """A branch of one form at one block, fitted on all images, and its trials by rotation. `found`: plain values."""

    branch: BlockBranch
    trials: tuple[Tried, ...]
    found: dict[str, Any]


def _trials(form: str, sums: BlockSums, place: Place, ridges: Sequence[float]) -> tuple[tuple[Tried, ...], Tried]:
    """Return what each rotation chooses, and both. Raises NoFitError if no ridge gives a fit."""
    by_ridge: dict[float, tuple[BlockBranch, ...]] = {}
    refusal = ""
    for ridge in ridges:
        try:
            by_ridge[ridge] = tuple(FORMS[form].fit(half, place, ridge) for half in sums.halves())
        except (NoFitError, torch.linalg.LinAlgError) as reason:
            refusal = refusal or str(reason)
    if not by_ridge:
        raise NoFitError(refusal)

    def best(parts: Sequence[int]) -> Tried:
        found = [Tried(each, ridge, sums.held_out_r2(each, parts)) for ridge, each in by_ridge.items()]
        return max(found, key=lambda one: one.r2)

    return tuple(best([part]) for part, _ in ROTATIONS), best([part for part, _ in ROTATIONS])


def fit_branch(form: str, sums: BlockSums, place: Place, config: Config) -> tuple[Fitted | None, dict[str, Any]]:
    """Return (the branch, or None if it is not kept; what was found, as plain values)."""
    groups, layout = sums.groups(), place.layout
    total, samples = sum(group.total() for group in groups), groups[0].count
    found: dict[str, Any] = {"form": form, "samples": int(samples), "groups": layout.groups, "stride": layout.stride}
    if total <= LOSSLESS * samples:
        return None, found | {"kept": False, "reason": "rounding changes nothing here"}
    try:
        trials, together = _trials(form, sums, place, config.ridges)
        branch = FORMS[form].fit(groups, place, together.ridge)
    except (NoFitError, torch.linalg.LinAlgError) as reason:
        return None, found | {"kept": False, "reason": str(reason)}
    fits = branch.fits()
    error = sum(group.sse(fit.weight, fit.bias) for group, fit in zip(groups, fits, strict=True))
    found |= {
        "r2": r2(groups, fits),
        "r2_cv": together.r2,
        "ridge": together.ridge,
        "r2_official": sums.official_r2(error, groups),
        "largest_weight": max(float(fit.weight.abs().max()) for fit in fits),
        "error_before": sum(float(group.q.sum()) for group in groups) / samples,  # squared, per sample
        "error_after": error / samples,
        "variance": total / samples,
        "kernels": FORMS[form].kernels_at(place),
        "bytes": engine_bytes(branch),
    }
    if (bound := fp16_bound(branch, sums.reach)) > FP16_MAX:
        return None, found | {"kept": False, "reason": f"outputs up to {bound:.0f} overflow FP16"}
    if not together.r2 > 0:
        return None, found | {"kept": False, "reason": f"R2 {together.r2:.3f} on held-out images is not above 0"}
    found |= {"kept": True, "reason": f"R2 {together.r2:.3f} on held-out images"}
    return Fitted(branch, trials, found), found


def option(block: str, found: Mapping[str, Any]) -> Option:
    """Return what `fit_branch` found as a choice: its gain is the squared error per sample it removes on held-out images."""
    return Option(
        block, found["form"], found["r2_cv"] * found["variance"], found["variance"], found["kernels"], found["bytes"]
    )


class Joined:
    """The halves as one set of batches; `part_of[index]` says which part, as `BlockSums` numbers them, a batch is from."""

    def __init__(self, halves: Sequence[Half]) -> None:
        self.parts = [part for half in halves for part in half.parts]
        self.part_of = [index for index, part in enumerate(self.parts) for _ in range(len(part))]
        self.halves = len(halves)

    def __iter__(self) -> Iterator[Tensor]:
        return (batch for part in self.parts for batch in part)

    def __len__(self) -> int:
        return len(self.part_of)


def _run(block: nn.Module, call: Call, grids: Mapping[str, QParams]) -> tuple[Tensor, dict[str, Tensor]]:
    """(what `block` returns, what branches may read by its name: the block's input as "", what the layers `grids` round)."""
    seen = {"": call.x}

    def see(reader: str, _layer: nn.Module, x: Tensor) -> None:
        seen[reader] = grids[reader].fake_quantize(x)

    with input_hooks(block, grids, see):
        return call.run(block), seen


def _add_samples(
    sums: Mapping[str, BlockSums],
    blocks: tuple[nn.Module, nn.Module],
    path: Carry,
    name: str,
    images: Joined,
    rows: int,
) -> None:
    """Run block `name`, (exact, quantized), on all images and add up what separates their outputs.

    Both read what the quantized network, compensated so far, gives them.
    """
    exact, quantized = blocks
    grids = {reader: grid for each in sums.values() for reader, grid in each.place.shared.values() if reader in sums}
    for index, call in enumerate(path.calls(name)):
        output, inputs = _run(quantized, call, grids)
        path.keep(index, output)
        if not sums:
            continue
        target = call.run(exact)
        for source, found in sums.items():
            layout = found.layout
            samples = (output.numel() // (layout.d_out * layout.groups)) * len(images)
            step = max(1, samples // (rows * images.halves))
            found.update(inputs[source], target - output, images.part_of[index], step)


def _fit_blocks(
    model: QuantModel, where: Places, images: Joined, config: Config, allowed: Mapping[str, Forms]
) -> tuple[dict[str, Fitted], dict[str, list[dict[str, Any]]]]:
    """Return (the branch at every block that gets one, all that was tried by block), each after the blocks before it.

    Of several forms that pass, a block goes on with the one worth most by itself, if it is within the limits by itself.
    """
    net, exact = quantized_net(model), model.exact_net
    forms_of = {name: [form for form in allowed[name] if place.serves(form)] for name, place in where.of.items()}
    last = max((index for index, forms in enumerate(forms_of.values()) if forms), default=-1)
    kept: dict[str, Fitted] = {}
    tried: dict[str, list[dict[str, Any]]] = {name: [] for name in forms_of}
    path = Carry(net, images, where.reading_on)
    for name, forms in list(forms_of.items())[: last + 1]:
        place = where.of[name]
        sums = {place.source(form): BlockSums(place, len(images.parts)) for form in forms}
        block = net.get_submodule(name)
        _add_samples(sums, (exact.get_submodule(name), block), path, name, images, config.rows)
        fits = [fit_branch(form, sums[place.source(form)], place, config) for form in forms]
        tried[name] = [found for _, found in fits]
        passed = {found["form"]: fitted for fitted, found in fits if fitted}
        options = [option(name, fitted.found) for fitted in passed.values()]
        chosen = select(options, config.min_r2_per_kernel, *config.limits)
        branch = passed[chosen[name].form] if name in chosen else None
        if branch is not None:
            branch.branch.attach(block)
            kept[name] = branch
        path.advance(partial(branch.branch.of, block) if branch else None)
    return kept, tried


@torch.no_grad()
def candidates(model: QuantModel, halves: Sequence[Half], config: Config) -> Offer:
    """Offer `model` with all branches that fit their block, and with those that lower the output error; the plainer first.

    Branches that `model` has are replaced. Raises ValueError naming the block if one is not called, or edits its input.
    """
    model = replace(model, branches={}, branch_figures={})
    fitting = samples_where(model.net, halves, config.only_input, config.only_value) if config.only_input else halves
    images = Joined(fitting)
    where = places(model, quantized_net(model), next(iter(images))[:1])
    kept, tried = _fit_blocks(model, where, images, config, dict.fromkeys(where.of, config.forms))
    options = [option(name, found) for name, several in tried.items() for found in several if found["kept"]]
    chosen = select(options, config.min_r2_per_kernel, *config.limits)
    if {name: one.form for name, one in chosen.items()} != {name: one.found["form"] for name, one in kept.items()}:
        # a branch that goes changes what the later ones have to compensate for
        kept, _ = _fit_blocks(
            model, where, images, config, {name: (chosen[name].form,) if name in chosen else () for name in where.of}
        )
    points = front(options, config.min_r2_per_kernel)
    notes = (
        *_notes(model, config, kept, tried, points),
        *(f"no branch at {reason}" for reason in where.refused.values()),
    )
    details = {"tried": tried, "front": points}
    if not kept:
        return Offer([], notes, details)
    helpful = [_helpful(kept, config, rotation) for rotation in range(len(ROTATIONS))]
    every = _candidate(model, kept, list(kept), helpful)
    kernels = {name: one.found["kernels"] for name, one in kept.items()}
    few, by_rotation = worth_keeping(every, halves, kernels, config.min_r2_per_kernel)
    if not 0 < len(few) < len(kept):
        return Offer([every], notes, details)
    offered = [_candidate(model, kept, few, by_rotation), every]
    if not any(kernels[name] for name in kept if name not in few):
        offered.reverse()  # leaving out what costs no kernel is one choice more, which has to gain clearly
    return Offer(offered, notes, details)


def _helpful(kept: Mapping[str, Fitted], config: Config, rotation: int) -> list[str]:
    """Return the blocks of `kept` that would get their branch by the images that choose in `rotation` alone."""
    options = [
        replace(option(name, one.found), gain=one.trials[rotation].r2 * one.found["variance"])
        for name, one in kept.items()
    ]
    return list(select(options, config.min_r2_per_kernel, *config.limits))


def _candidate(
    model: QuantModel, kept: Mapping[str, Fitted], blocks: Sequence[str], by_rotation: Sequence[Sequence[str]]
) -> Candidate:
    """Return `model` with the branches of `kept` at `blocks`, in the trials of rotation r at `by_rotation[r]`."""

    def with_branches(branches: dict[str, Branch]) -> QuantModel:
        return replace(model, branches=branches, branch_figures={name: kept[name].found for name in branches})

    trials = tuple(
        tuple(with_branches({name: kept[name].trials[rotation].by_half[half] for name in names}) for half in range(2))
        for rotation, names in enumerate(by_rotation)
    )
    title = f"branches at {len(blocks)} of {len(kept)} blocks"
    return Candidate(title, trials, with_branches({name: kept[name].branch for name in blocks}))


def _notes(
    model: QuantModel,
    config: Config,
    kept: Mapping[str, Fitted],
    tried: Mapping[str, Sequence[Mapping[str, Any]]],
    points: Sequence[Mapping[str, Any]],
) -> tuple[str, ...]:
    dropped = tuple(
        f"no branch at {name}: " + "; ".join(f"{found['form']}: {found['reason']}" for found in several)
        for name, several in tried.items()
        if several and not any(found["kept"] for found in several)
    )
    used = {found["form"] for several in tried.values() for found in several}
    unused = tuple(
        f"form '{form}' does not apply: it needs blocks with an INT8 layer behind a norm, and those of "
        f"{model.structure.kind} have none it could join"
        for form in config.forms
        if form not in used
    )
    costly = [
        f"{found['form']} at {name} (R2 {found['r2_cv']:.2f} for {found['kernels']} kernels)"
        for name, several in tried.items()
        for found in several
        if found["kept"] and name not in kept
    ]
    beyond = (f"removes too little error for its cost, or beyond a limit: {', '.join(costly)}",) if costly else ()
    costs = [f"+{p['kernels']} kernels, {p['bytes'] / 1e6:.2f} MB: {p['r2']:.1%}" for p in points]
    shown = ("block error removed, by cost: " + " | ".join(costs),) if costs else ()
    forms = [fitted.found["form"] for fitted in kept.values()]
    counts = ", ".join(f"{form} x{forms.count(form)}" for form in dict.fromkeys(forms)) or "none"
    scores = [fitted.found["r2_cv"] for fitted in kept.values()]
    low, high = (f"{each:.2f}" for each in (min(scores, default=0), max(scores, default=0)))
    ranges = f", held-out R2 {low}{f' to {high}' if high != low else ''}" if scores else ""
    return (
        f"branches fitted at {len(kept)} of {len(tried)} blocks ({counts}){ranges}",
        *unused,
        *shown,
        *beyond,
        *dropped,
    )
