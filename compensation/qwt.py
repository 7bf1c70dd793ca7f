"""QwT: a linear branch beside every quantized block gives back what rounding took, in closed form (Fu et al., 2024).

For block l with input x from the already compensated quantized network, in the order of the network (eq. 6):

    r = l_exact(x) - l_quant(x)        W, b = argmin sum |r - W x - b|^2        l_quant(x) + W x + b  from now on

What differs from the reference code, and why:
1. Sums in float64 with a shift (compensation/moments.py) instead of a float32 inverse, which gave negative R2 on its
training data. 2. A branch is judged on photographs it was not fitted on, with the numbers that run (FP16, INT8); the
   reference's test, R2 > 0 on the training data, can never fail for exact least squares. All of them together are
   judged by the network's output, again on other photographs.
3. A branch that does not pass is left out of the network instead of being filled with zeros.
4. `exact_net` is the target: switching the quantizers of the network itself off would give a wrong one, once a method has
   changed weights.
5. The form is chosen per block by what it brings and costs (compensation/select.py): shared ones cost no kernel at all.
   What the network's output is as good without is left out in the end (compensation/leave_out.py).
6. `target = "global"` aims at the float path from the images on instead: r = l_exact(x_exact) - l_quant(x), so that what one
   block leaves is the next one's to mend.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from calib.grids import why_not_int8
from calib.hooks import input_hooks
from calib.images.batches import Batches
from calib.judge.held_out import MARGIN_DB, sqnr_db
from calib.network.fp16_range import FP16_MAX
from calib.network.qdq import quantized_net
from calib.quant_model import Branch, QuantModel, StageRecord
from calib.quantizer import QParams
from compensation.branch import BlockBranch
from compensation.carry import CARRIES, Call, Carry
from compensation.chain import block_layouts
from compensation.forms import FORMS, NoFitError, Place
from compensation.leave_out import worth_keeping
from compensation.moments import Fit, Moments, cross_validated_r2, pooled, r2
from compensation.select import UNLIMITED, Option, front, select
from compensation.sizes import engine_bytes

LOSSLESS = 1e-12  # variance of r per sample below which there is nothing to mend
Forms = tuple[str, ...]


@dataclass(frozen=True)
class Config:
    """How branches are fitted, and when one is kept."""

    forms: Forms = ("shared", "shared_mlp", "dense")  # tried at every block: see FORMS
    rank: int = 32  # of the low-rank form; the others ignore it
    target: str = "local"  # local: the exact block on the same input; global: the exact network's own path
    rows: int = 16384  # samples per block and fold; more tokens than that are thinned out evenly
    ridges: tuple[float, ...] = (0.0, 0.003, 0.03, 0.3, 3.0)  # tried, on channels of unit power; 0 is the paper's
    r2_min: float = 0.0  # a branch is kept if its cross-validated R2 is above this
    kernel_price: float = 0.05  # R2 that one more kernel must bring
    by_output: bool = True  # branches that the network's output is as good without are left out
    min_gain_db: float = MARGIN_DB  # of the network's output on other photographs, or all branches go
    max_extra_kernels: int = UNLIMITED  # of all branches together
    max_extra_bytes: int = UNLIMITED
    carry: str = "memory"  # memory | disk | recompute: where block inputs wait (compensation/carry.py)

    def __post_init__(self) -> None:
        if not self.ridges or min(self.ridges) < 0:
            raise ValueError(f"ridges {self.ridges} are not numbers of at least 0")
        for form in self.forms:
            if form not in FORMS:
                raise ValueError(f"form '{form}' is not one of {', '.join(FORMS)}")
        for name, value, known in (("target", self.target, ("local", "global")), ("carry", self.carry, CARRIES)):
            if value not in known:
                raise ValueError(f"{name} '{value}' is not one of {', '.join(known)}")
        for name, number, least in (("rows", self.rows, 1), ("rank", self.rank, 1)):
            if number < least:
                raise ValueError(f"{name} is {number}: expected {least} or more")

    @property
    def limits(self) -> tuple[int, int]:
        """The most kernels and bytes of all branches together."""
        return self.max_extra_kernels, self.max_extra_bytes


class BlockSums:
    """All that is remembered of one block's samples: sums per fold and group, and what the official R2 of maps needs."""

    def __init__(self, place: Place, folds: int) -> None:
        layout = place.layout
        self.layout = layout
        self.folds = [[Moments(layout.d_in, layout.d_out) for _ in range(layout.groups)] for _ in range(folds)]
        self.reach = torch.zeros(layout.groups, layout.d_in)  # largest |x| per channel
        self.images = 0
        self.power = 0.0  # sum of all r^2, and of the images per (c, h, w), of maps
        self.position_sum = torch.zeros(1, 1, 1, dtype=torch.float64)

    def update(self, x: Tensor, r: Tensor, fold: int, step: int = 1) -> None:
        """Add every `step`-th sample of the images `x`, `r` (what is read, what the branch should return) to `fold`."""
        rows = self.layout.input_rows(x)
        for moments, inputs, targets in zip(self.folds[fold], rows, self.layout.output_rows(r), strict=True):
            moments.update(inputs[::step], targets[::step])
        self.reach = torch.maximum(self.reach, torch.stack([group.abs().amax(0) for group in rows]))
        self.images += len(x)
        if not self.layout.channels_last:
            self.power += float(r.square().sum(dtype=torch.float64))
            self.position_sum = self.position_sum + r.sum(0, dtype=torch.float64)

    def groups(self) -> list[Moments]:
        """The sums of all folds, per group."""
        return [pooled(group) for group in zip(*self.folds, strict=True)]

    def official_r2(self, error: float, groups: Sequence[Moments]) -> float:
        """R2 of the reference code: for maps about the mean of every (c, h, w), else of every channel.

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
class Fitted:
    """A branch of one form at one block: fitted on all images, and without each of the folds. `found`: plain values."""

    branch: BlockBranch
    without: tuple[BlockBranch, ...]
    found: dict[str, Any]


def fit_branch(form: str, sums: BlockSums, place: Place, config: Config) -> tuple[Fitted | None, dict[str, Any]]:
    """(the branch, or None if it is not worth its place; what was found, as plain values)."""
    groups, layout = sums.groups(), place.layout
    total, samples = sum(group.total() for group in groups), groups[0].count
    found: dict[str, Any] = {"form": form, "samples": int(samples), "groups": layout.groups, "stride": layout.stride}
    if total <= LOSSLESS * samples:
        return None, found | {"kept": False, "reason": "rounding changes nothing here"}
    damped: list[tuple[float, float, BlockBranch, list[BlockBranch]]] = []
    refusal = ""
    for ridge in config.ridges:
        without: list[BlockBranch] = []

        def left_out(parts: Sequence[Moments], ridge: float = ridge, without: list[BlockBranch] = without) -> list[Fit]:
            without.append(FORMS[form].fit(parts, place, ridge))
            return without[-1].fits()

        try:
            branch = FORMS[form].fit(groups, place, ridge)
            damped.append((cross_validated_r2(sums.folds, left_out), ridge, branch, without))
        except (NoFitError, torch.linalg.LinAlgError) as reason:
            refusal = refusal or str(reason)
    if not damped:
        return None, found | {"kept": False, "reason": refusal}
    r2_cv, ridge, branch, without = max(damped, key=lambda one: one[0])
    fits = branch.fits()
    error = sum(group.sse(fit.weight, fit.bias) for group, fit in zip(groups, fits, strict=True))
    found |= {
        "r2": r2(groups, fits),
        "r2_cv": r2_cv,
        "ridge": ridge,
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
    if not r2_cv > config.r2_min:
        return None, found | {"kept": False, "reason": f"cross-validated R2 {r2_cv:.3f} is not above {config.r2_min:g}"}
    found |= {"kept": True, "reason": f"cross-validated R2 {r2_cv:.3f}"}
    return Fitted(branch, tuple(without), found), found


def option(block: str, found: Mapping[str, Any]) -> Option:
    """What `fit_branch` found, as a choice: its gain is the squared error per sample it takes away on other photographs."""
    return Option(
        block, found["form"], found["r2_cv"] * found["variance"], found["variance"], found["kernels"], found["bytes"]
    )


class Joined:
    """Several folds as one set of batches; `fold_of[index]` says where a batch comes from."""

    def __init__(self, folds: Sequence[Batches]) -> None:
        self.folds = folds
        self.fold_of = [fold for fold, batches in enumerate(folds) for _ in range(len(batches))]
        if len(folds) == 1:  # one photograph: halves of it have to judge each other
            self.fold_of = [2 * index // len(self.fold_of) for index in range(len(self.fold_of))]

    def __iter__(self) -> Iterator[Tensor]:
        return (batch for batches in self.folds for batch in batches)

    def __len__(self) -> int:
        return len(self.fold_of)


def places(model: QuantModel, net: nn.Module, images: Tensor, config: Config) -> dict[str, Place]:
    """Where branches go, by block; raises ValueError naming the blocks if they are no chain."""
    found = {}
    for name, layout in block_layouts(model, net, images).items():
        shared = {}
        for form, reader in model.family.shared.items():
            grid = model.quantizers.get(f"{name}.{reader}:input")
            if isinstance(grid, QParams) and not why_not_int8(grid):  # an INT8 branch reads its integers
                shared[form] = (reader, grid)
        found[name] = Place(layout, config.rank, shared)
    return found


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
    paths: tuple[Carry, Carry | None],
    name: str,
    place: Place,
    images: Joined,
    rows: int,
) -> None:
    """One pass over the images: run block `name`, (exact, quantized), and add up what separates them, if anything asks.

    The exact block reads what the quantized one reads, or with a second path what it finds there.
    """
    (exact, quantized), (path, float_path) = blocks, paths
    float_calls = float_path.calls(name) if float_path else None
    grids = {reader: grid for reader, grid in place.shared.values() if reader in sums}
    for index, call in enumerate(path.calls(name)):
        output, inputs = _run(quantized, call, grids)
        path.keep(index, output)
        if not sums and not float_path:
            continue
        float_call = next(float_calls) if float_calls else call
        target = float_call.run(exact)
        if float_path:
            float_path.keep(index, target)
        samples = (output.numel() // (place.layout.d_out * place.layout.groups)) * len(images)
        step = max(1, samples // (rows * len(images.folds)))
        for source, found in sums.items():
            found.update(inputs[source], target - output, images.fold_of[index], step)


def _fit_blocks(
    model: QuantModel, images: Joined, config: Config, allowed: Mapping[str, Forms]
) -> tuple[dict[str, Fitted], dict[str, list[dict[str, Any]]]]:
    """(the branch at every block that gets one, all that was tried by block); blocks in turn, each after the ones before.

    Of several forms that pass, a block goes on with the one worth most by itself, if it is within the limits by itself.
    """
    net, exact = quantized_net(model), model.exact_net
    where = places(model, net, next(iter(images))[:1], config)
    forms_of = {name: [form for form in allowed[name] if place.serves(form)] for name, place in where.items()}
    last = max((index for index, forms in enumerate(forms_of.values()) if forms), default=-1)
    kept: dict[str, Fitted] = {}
    tried: dict[str, list[dict[str, Any]]] = {name: [] for name in where}
    carry = CARRIES[config.carry]
    with carry(net, images) as path, carry(exact, images) as float_path:
        for name, forms in list(forms_of.items())[: last + 1]:
            place = where[name]
            sums = {place.source(form): BlockSums(place, max(images.fold_of) + 1) for form in forms}
            block = net.get_submodule(name)
            paths = (path, float_path if config.target == "global" else None)
            _add_samples(sums, (exact.get_submodule(name), block), paths, name, place, images, config.rows)
            fits = [fit_branch(form, sums[place.source(form)], place, config) for form in forms]
            tried[name] = [found for _, found in fits]
            passed = {found["form"]: fitted for fitted, found in fits if fitted}
            options = [option(name, fitted.found) for fitted in passed.values()]
            chosen = select(options, config.kernel_price, *config.limits)
            branch = passed[chosen[name].form] if name in chosen else None
            if branch is not None:
                branch.branch.attach(block)
                kept[name] = branch
            path.advance(partial(branch.branch.of, block) if branch else None)
            float_path.advance(None)
    return kept, tried


@torch.no_grad()
def compensate(model: QuantModel, folds: Sequence[Batches], config: Config) -> QuantModel:
    """`model` with a branch beside every block where it helps; those it had are replaced.

    `folds` are parts of the calibration set without a common photograph. Raises ValueError naming the blocks if they are no
    chain.
    """
    start = time.perf_counter()
    model, images = replace(model, branches={}), Joined(folds)
    names = model.family.blocks(model.net)
    kept, tried = _fit_blocks(model, images, config, dict.fromkeys(names, config.forms))
    options = [option(name, found) for name, several in tried.items() for found in several if found["kept"]]
    chosen = select(options, config.kernel_price, *config.limits)
    if {name: one.form for name, one in chosen.items()} != {name: one.found["form"] for name, one in kept.items()}:
        # the branches left out change what the later ones have to mend
        kept, _ = _fit_blocks(
            model, images, config, {name: (chosen[name].form,) if name in chosen else () for name in names}
        )
    points = front(options, config.kernel_price)
    before, after, left_out = _choice(model, folds, config, kept)
    branches: dict[str, Branch] = {name: one.branch for name, one in kept.items() if name not in left_out}
    worth = bool(branches) and after >= before + config.min_gain_db
    notes = (
        *_notes(model, config, kept, tried, points),
        *([f"left out, for the output is as good without: {', '.join(left_out)}"] if left_out else []),
        f"{'kept' if worth else 'not worth it, dropped'}: network output {after:.2f} dB against {before:.2f} dB without "
        "branches, on other photographs",
    )
    record = StageRecord(
        "qwt", asdict(config), time.perf_counter() - start, before, after if worth else before, notes,
        {"tried": tried, "kept": {name: kept[name].found for name in branches} if worth else {},
         "front": points},
    )  # fmt: skip
    return replace(model, branches=branches if worth else {}).with_record(record)


def _choice(
    model: QuantModel, folds: Sequence[Batches], config: Config, kept: Mapping[str, Fitted]
) -> tuple[float, float, list[str]]:
    """(dB of the output without branches, with those of the better choice, blocks that this leaves without one)."""

    def judges(blocks: Sequence[str]) -> list[QuantModel]:
        """The i-th is fitted without fold i - 1, which `sqnr_db` judges it on."""
        return [
            replace(model, branches={name: kept[name].without[index - 1] for name in blocks})
            for index in range(len(folds))
        ]

    if not kept:
        (before,) = sqnr_db(folds, judges([]))
        return before, before, []
    everything, few = list(kept), list(kept)
    if config.by_output:
        few = worth_keeping(judges(few), folds, [kept[name].found["kernels"] for name in few], config.kernel_price)
    choices = [everything] if few == everything else [everything, few]
    before, *after = sqnr_db(folds, judges([]), *(judges(choice) for choice in choices))
    left_out = [name for name in everything if name not in few]
    cheaper = any(kept[name].found["kernels"] for name in left_out)
    if after[-1] >= after[0] - (MARGIN_DB if cheaper else 0.0):
        return before, after[-1], left_out
    return before, after[0], []


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
        f"form '{form}' does not apply: it needs blocks with an INT8 layer behind a norm, and those of family "
        f"'{model.family.name}' have none it could join"
        for form in config.forms
        if form not in used
    )
    unpaid = [
        f"{found['form']} at {name} (R2 {found['r2_cv']:.2f} for {found['kernels']} kernels)"
        for name, several in tried.items()
        for found in several
        if found["kept"] and name not in kept
    ]
    too_dear = (f"helps, but not enough for what it costs, or beyond a limit: {', '.join(unpaid)}",) if unpaid else ()
    costs = [f"+{p['kernels']} kernels, {p['bytes'] / 1e6:.2f} MB: {p['r2']:.1%}" for p in points]
    shown = ("block error mended, by cost: " + " | ".join(costs),) if costs else ()
    forms = [fitted.found["form"] for fitted in kept.values()]
    counts = ", ".join(f"{form} x{forms.count(form)}" for form in dict.fromkeys(forms)) or "none"
    scores = [fitted.found["r2_cv"] for fitted in kept.values()]
    ranges = f", cross-validated R2 {min(scores):.2f} to {max(scores):.2f}" if scores else ""
    return (f"{len(kept)} of {len(tried)} blocks compensated ({counts}){ranges}", *unused, *shown, *too_dear, *dropped)
