"""The spine: from a model name to a verified INT8 engine, stage by stage. Read this file first, then calib/network/qdq.py.

torch half:   load -> images -> fold -> equalise -> calibrate -> range -> round weights -> coverage
bridge:       export -> parity
engine half:  check -> build -> audit -> verify -> run -> benchmark -> accept -> package

A stage is a function (deploy/steps.py) of the `Run` (deploy/run.py), whose fields it reads and writes. What a stage of the
torch half decided is kept (deploy/kept_states.py), so that a run can stop after any stage (`--until`) and go on at any
(`--from`). Engines are kept too (deploy/kept_engines.py). The graphs and all proofs are made anew in every run.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from calib.device import chosen_device
from calib.errors import UserError
from calib.store.user_cache import cache_folder
from calib.weights.zoo import ModelSpec, spec_of
from deploy import kept_engines, steps
from deploy.engine.backends import choose_backend
from deploy.host import return_memory, reuse_memory
from deploy.kept_engines import KeptEngines
from deploy.kept_states import KeptStates
from deploy.options import Options
from deploy.package import not_accepted, package_folder, staging
from deploy.plan import BRIDGE, ENGINE, TORCH, Stage, planned
from deploy.progress import Progress
from deploy.recipe import OPTIONAL, Recipe, load_recipe, recipe_from_tables
from deploy.run import Run
from deploy.stages import Stage as ModelStage
from deploy.stages import repair_stages, scale_stages

IMAGES = ("calibration", "evaluation", "annotations", "golden", "model", "images", "key")
EXPORTED = ("simulation", "graph", "fp32", "graph_without_branches", "beyond_fp16", "float_model")
COMPARED = ("parity", "golden_outputs", "model", "loaded")
BUILT_FROM = ("graph", "fp32", "graph_without_branches", "beyond_fp16", "float_model")
JUDGED = ("float_model", "outputs", "evaluation", "annotations", "golden", "loaded", "task")
MEASURED = (
    "loaded", "outputs", "task", "model", "calibration", "evaluation", "fp16_range", "coverage", "parity", "planned",
    "built", "engine_without_branches", "kernels", "audit", "verdict", "execution", "speed", "acceptance", "float_model",
)  # fmt: skip


def _deciding(stages: Iterator[ModelStage]) -> Iterator[Stage]:
    """Stages that change the model, as stages of a run."""
    for stage in stages:
        reads, writes = ("model", "images", "key"), ("model", "key")
        yield Stage(stage.name, TORCH, reads, writes, partial(steps.decide, stage=stage))


def spine(recipe: Recipe, limit: str = "") -> tuple[Stage, ...]:
    """All stages in order: name, half, what it reads, what it writes, what it runs. `limit`: on accuracy, in words."""
    return (
        Stage("load", TORCH, (), ("loaded", "outputs", "task"), steps.load),
        Stage("images", TORCH, ("loaded", "outputs", "task"), IMAGES, steps.read_images),
        Stage("fold", TORCH, ("model", "images"), ("model",), steps.fold),
        *_deciding(scale_stages(recipe)),  # equalise, (simulated attention), calibrate
        Stage("range", TORCH, ("model", "calibration", "outputs"), ("fp16_range",), steps.fits_fp16),
        *_deciding(repair_stages(recipe, limit)),  # the method that rounds weights, (attention), ...
        Stage("coverage", TORCH, ("model", "evaluation", "outputs"), ("coverage",), steps.covers),
        Stage("export", BRIDGE, ("model", "loaded", "golden"), ("model", *EXPORTED), steps.export),
        Stage("parity", BRIDGE, ("simulation", "fp32", "golden", "model", "loaded"), COMPARED, steps.agrees),
        Stage("check", ENGINE, ("graph",), ("planned", "planned_attention"), steps.check),
        Stage("build", ENGINE, BUILT_FROM, ("built", "engine_without_branches", "kernels"), steps.build),
        Stage("audit", ENGINE, ("built", "planned", "planned_attention"), ("audit",), steps.prove),
        Stage("verify", ENGINE, JUDGED, ("reference", "verdict"), steps.verify),
        Stage("run", ENGINE, ("built", "reference", "verdict"), ("execution",), steps.execute),
        Stage("benchmark", ENGINE, ("float_model", "loaded", "golden"), ("speed",), steps.benchmark),
        Stage("accept", ENGINE, ("task", "verdict", "execution", "speed"), ("acceptance",), steps.accept),
        Stage("package", ENGINE, ("golden", "golden_outputs", *MEASURED), ("report",), steps.package),
    )  # fmt: skip


def stage_names() -> dict[str, tuple[str, ...]]:
    """The names of all stages in order, by half; in brackets those that not every recipe has."""
    every: dict[str, Any] = {key: {} for key in OPTIONAL}
    most, least = spine(recipe_from_tables("", every, ""), "a limit"), spine(recipe_from_tables("", {}, ""))
    always = {stage.name for stage in least}
    return {
        half: tuple(stage.name if stage.name in always else f"[{stage.name}]" for stage in most if stage.half == half)
        for half in (TORCH, BRIDGE, ENGINE)
    }


@contextmanager
def _folder(final: Path, whole: bool, become: Callable[[], Path]) -> Iterator[Path]:
    """Where the files of the package go: what `become` names in the end, or for a run that stops early what vanishes."""
    with staging(final, become) if whole else tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _kept(options: Options, spec: ModelSpec, progress: Progress) -> tuple[KeptStates, KeptEngines]:
    """What earlier runs kept; says why where nothing can be kept."""
    states = engines = None
    if options.cache:
        try:
            states, engines = cache_folder("stages"), cache_folder(kept_engines.FOLDER)
        except UserError as error:
            progress.console.print(f"  nothing is kept for later runs: {error}", markup=False)
    if states and spec.factory:
        why = "the code of your own network is not part of their keys"
        progress.console.print(f"  the stages before export are not kept for later runs: {why}", markup=False)
        states = None
    return KeptStates(states), KeptEngines(engines)


def engine(options: Options) -> tuple[Path, dict[str, Any]] | str:
    """Run the stages. Returns the package's folder and the report, or where a run that was to stop early can go on.

    A package that does not keep its limits goes beside the folder that it was meant for, where an earlier one stays.
    Raises UserError for bad input and ContractError if the result does not hold; nothing is left behind then.
    """
    spec = spec_of(options.model, options.module, options.input_size)
    recipe = load_recipe(options.recipe).for_engine().limited(options.max_extra_kernels, options.max_extra_bytes)
    stages = spine(recipe, options.limits.on_accuracy())
    plan = planned(stages, options.begin, options.until)
    if options.begin and not options.cache:
        raise UserError("--from goes on from kept states, which CACHE=off does not read: give CACHE=on or no --from")
    backend, why = choose_backend(options.target)
    backend.require_target(options.sms, options.builder)
    options.limits.require_timed(backend.NAME)
    device = chosen_device(options.device)
    final = package_folder(options.out, options.model, options.module, options.weights, options.recipe)
    name = final.parent.name
    progress = Progress(f"{name}, recipe {recipe.name}, backend {backend.NAME} ({why})")
    kept, engines = _kept(options, spec, progress)
    if options.begin and kept.folder is None:
        raise UserError("--from goes on from kept states, and none are kept, as said above: run without --from")
    reuse_memory()
    last = stages.index(plan[-1])
    whole = plan[-1] is stages[-1]
    run: Run
    place = lambda: final if run.acceptance.accepted else not_accepted(final)  # noqa: E731 - of a whole run, in the end
    with _folder(final, whole, place) as folder, tempfile.TemporaryDirectory() as scratch:
        run = Run(name, options, spec, recipe, backend, final, folder, Path(scratch), progress, kept, engines, device)
        for stage in plan:
            run.anew = run.anew or stage.name == options.begin
            with progress.stage(stage.name) as note:
                note(*stage.run(run))
            return_memory()  # so that no stage adds its peak to what others left
    if whole:
        return place(), run.report
    after = stages[last + 1].name
    go_on = f"go on with --from '{after}' (FROM='{after}')" if kept.folder else "nothing was kept to go on from"
    return f"stopped after '{options.until}': nothing was written to {options.out}; {go_on}"
