"""What the stages of `make engine` do, in order; deploy/pipeline.py lists them.

A stage is a function of the `Run`: it reads and writes fields of it, and returns the lines that tell what came of it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from calib.device import CPU
from calib.errors import UserError, first_line, of_types, several_types
from calib.hooks import output_hooks
from calib.images.annotations import annotations_of, boxes_from_coco
from calib.images.image_set import ImageSet, Reading, image_sets
from calib.images.preprocess import preprocessing_from_config
from calib.input_rows import arrays_from_rows
from calib.inputs import Inputs
from calib.network.fp16_range import FP16_MAX, fp16_range, require_fp16_weights
from calib.network.qdq import quantized_net
from calib.outputs import (
    Output,
    checked_outputs,
    join_outputs,
    named_outputs,
    outputs_from,
    require_function_of_each,
    separate_outputs,
    task_of,
)
from calib.quant_model import QuantModel
from calib.scales.coverage import coverage
from calib.store.paths import expanded
from calib.store.user_cache import cache_folder
from calib.store.watch import Watch
from calib.task import CLASSIFIER
from calib.weights.load import load_net
from compensation.fitted_on import samples_where
from deploy.acceptance import keeps
from deploy.bridge.export import Example, export_float, export_pair, halved, save
from deploy.bridge.parity import compare_with_onnx
from deploy.engine.audit import planned_attention, planned_layers
from deploy.engine.backends import Built
from deploy.errors import ContractError
from deploy.execution import Execution, executed, executed_here
from deploy.explain.kernel_list import KernelLists, lists_to_json
from deploy.graph.check import require_strongly_typed
from deploy.measure.onnx_runner import Given
from deploy.named_inputs import ids_in_embeddings, inputs_told_by, require_readable, require_used, two_samples
from deploy.package import (
    ENGINE,
    FILES,
    GOLDEN,
    GOLDEN_FLOAT,
    GOLDEN_INPUT,
    GOLDEN_ONLY,
    GOLDEN_SIMULATED,
    KERNELS,
    LAYERS,
    MANIFEST,
    MODEL,
    MODEL_FP32,
    REPORT,
    stored_bytes,
    write_json,
)
from deploy.progress import Progress
from deploy.proven import proven
from deploy.report.evidence import report_json
from deploy.report.manifest import manifest_json, replaced
from deploy.run import Run
from deploy.stages import FOLD, CalibrationImages, Stage, halves_of
from deploy.verify import Reference, cpu_speed, verify_fidelity

BATCH = 16  # images per forward pass on the CPU
PIXELS = BATCH * 448 * 448  # of all images of a pass: 16 of 896 x 896 took more than 15 GB in SAM 2's encoder
GOLDEN_IMAGES = 8  # fewer of large ones: graphs run on all of them at once
JUDGED_BYTES = (
    1 << 30
)  # of the float network's outputs on all images that judge; the INT8 network's are held beside them
KEPT_BYTES = 1 << 27  # of a set of images: 220 of 224 x 224
RANGE_IMAGES = 32  # calibration images the float network must fit FP16 on
COVERAGE_IMAGES = 64  # most evaluation images looked at for values outside the calibrated ranges

Lines = Sequence[str]  # what a stage tells


def per_pass(reading: Reading, outputs: Sequence[Output] = ()) -> int:
    """Return how many images or samples go through a network at once: fewer of large images, whose tensors are large.

    `outputs`: those of the network; where one is a larger picture than it read, that one counts.
    """
    if isinstance(reading, Inputs):
        return BATCH
    pictures = (each.shape[1] * each.shape[2] for each in outputs if len(each.shape) == 3)
    return max(1, min(BATCH, PIXELS // max(reading.height * reading.width, *pictures, 1)))


class Batches:
    """The images of a set as re-iterable arrays (B, 3, H, W) or rows (B, N), with a progress bar on each pass.

    A set of at most KEPT_BYTES is kept in memory after the first pass, as reading files takes longer than many a network.
    """

    def __init__(
        self,
        images: ImageSet,
        progress: Progress,
        convert: Callable[[np.ndarray], Any],
        outputs: Sequence[Output] = (),
    ) -> None:
        self.images, self.progress, self.convert = images, progress, convert
        self._kept: list[np.ndarray] = []
        self.per_pass = per_pass(images.preprocessing, outputs)

    def __iter__(self) -> Iterator[Any]:
        kept: list[np.ndarray] = []
        small = False
        for number, batch in enumerate(self.progress.bar(self._kept or self.images.batches(self.per_pass), len(self))):
            if not number:  # the last one may be smaller than the others
                small = batch.nbytes * len(self) <= KEPT_BYTES
            if small:
                kept.append(batch)
            yield self.convert(batch.copy() if small else batch)  # who reads it may edit it
        self._kept = kept

    def __len__(self) -> int:
        return -(-self.images.count // self.per_pass)


def _batches(run: Run, images: ImageSet, convert: Callable[[np.ndarray], Any]) -> Batches:
    return Batches(images, run.progress, convert, run.outputs)


def _to(device: torch.device) -> Callable[[np.ndarray], torch.Tensor]:
    """Return what makes tensors on `device` of arrays."""
    return lambda batch: torch.from_numpy(batch).to(device)


def _named(prefix: str, net: nn.Module, images: np.ndarray) -> dict[str, np.ndarray]:
    """The outputs of `net`, for the file of golden images."""
    with torch.inference_mode(), separate_outputs(net):
        return {
            f"{prefix}{name}": value.numpy() for name, value in named_outputs(net(torch.from_numpy(images))).items()
        }


def _hold(contract: Any) -> None:
    if reason := contract.failure():
        raise ContractError(reason)


def _not_a_number(net: nn.Module, images: torch.Tensor) -> str:
    """Return the name of the first module of `net` that makes NaN or Inf of these images."""
    found: list[str] = []

    def after(name: str, output: Any) -> None:
        if not found and isinstance(output, torch.Tensor) and not output.isfinite().all():
            found.append(name)

    with output_hooks(net, [name for name, _ in net.named_modules()], after), torch.no_grad():
        net(images)
    return found[0] if found else ""


def _cannot_read(kind: str, images: torch.Tensor, inputs: Inputs | None, own: bool, error: Exception) -> UserError:
    said = first_line(error)
    if of_types(error):
        return several_types(kind, error)
    if inputs is None:
        others = (
            ", or for a network that takes other inputs than one image leave it out and give CALIB=, a .npz file with an "
            "array for each"
        )
        return UserError(
            f"{kind} cannot read images of {'x'.join(map(str, images.shape[1:]))} ({said}): give another INPUT="
            f"{others if own else ', or none for the size that it was trained on'}"
        )
    return UserError(
        f"{kind} cannot read {inputs.described()} ({type(error).__name__}: {said}): expected in CALIB= what its forward "
        f"pass takes, without the batch axis of a single sample"
    )


def _outputs(
    net: nn.Module, images: torch.Tensor, inputs: Inputs | None = None, own: bool = False
) -> tuple[Output, ...]:
    """Return the outputs that `net` computes from two or more `images` (B, 3, H, W), or rows (B, N) of its `inputs`.

    `own`: it is a network of the user's own, whose inputs may be others than images.
    Raises UserError unless it turns them into finite floating-point values.
    """
    kind = type(net).__name__
    try:
        with ids_in_embeddings(net):
            found = checked_outputs(net, images)
    except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
        raise _cannot_read(kind, images, inputs, own, error) from error
    outputs, classes = outputs_from(found), getattr(net, "num_classes", None)
    if task_of(net, outputs).name == CLASSIFIER and outputs[0].shape != (classes,):
        raise UserError(
            f"{kind} says num_classes = {classes!r} and returns {outputs[0].shape[0]} values: expected the same"
        )
    if not all(value.isfinite().all() for value in found.values()):
        name = _not_a_number(net, images)
        where = f"first in '{name}'" if name else "in its own forward pass, behind its modules"
        raise UserError(f"the float network computes NaN or Inf, {where}: give weights that work in float")
    if inputs is None:  # images of zeros, all equal, would hide what mixes them
        images = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    require_function_of_each(net, images)
    return outputs


def _check_labels(images: ImageSet, outputs: int) -> None:
    """Raise UserError for a class index that a classifier has no output for."""
    if images.labels is not None and max(images.labels) >= outputs:
        raise UserError(
            f"evaluation images have class {max(images.labels)}, but the network has {outputs} outputs: expected classes "
            f"0 to {outputs - 1}; class folders named by numbers count from 0"
        )


# The torch half.


def load(run: Run) -> Lines:
    """The float network."""
    calib = run.options.calib
    run.loaded = load_net(run.spec, run.options.weights, run.options.seed, inputs_told_by(calib))
    net, inputs = run.loaded.net, run.loaded.inputs
    if calib is not None and inputs is not None:
        samples = two_samples(calib, inputs)
        run.outputs = _outputs(net, samples, inputs)
        require_used(net, inputs, samples[:1])
    else:
        run.outputs = _outputs(net, torch.zeros(2, *run.loaded.data_config["input_size"]), own=bool(run.spec.factory))
    run.task = task_of(net, run.outputs)
    if run.options.limits.max_drop is not None:
        run.options.limits.max_drop.require_measurable(run.task.name)
    return (run.loaded.source,)


def _few_enough(images: ImageSet, outputs: Sequence[Output]) -> ImageSet:
    """Return as many of the evaluation images as have outputs that fit into memory, where these are pictures or maps."""
    values = sum(math.prod(each.shape) for each in outputs)
    most = max(JUDGED_BYTES // (4 * values), GOLDEN_IMAGES)
    return images if images.count <= most else replace(images.subset(0, most), too_many=images.count - most)


def _annotations(run: Run) -> list[np.ndarray] | None:
    """Return the boxes that COCO's annotations tell of the evaluation images of a detector; None without."""
    said, folder, reading = run.task.boxes, run.options.evaluation, run.evaluation.preprocessing
    if said is None or folder is None or isinstance(reading, Inputs):
        return None
    path = annotations_of(expanded(folder, "EVAL"))
    if path is None:
        return None
    names = [picture.name for picture in run.evaluation.pictures]
    return boxes_from_coco(path, names, reading, said.classes, said.background)


def read_images(run: Run) -> Lines:
    """Images to calibrate on and to judge on; with the weights they are what every later state depends on."""
    options, inputs = run.options, run.loaded.inputs
    preprocessing = inputs or preprocessing_from_config(run.loaded.data_config)
    run.calibration, run.evaluation = image_sets(
        options.calib, options.evaluation, preprocessing, options.calib_images, seed=options.seed
    )
    run.evaluation = _few_enough(run.evaluation, run.outputs)
    if options.limits.max_drop is not None:
        options.limits.max_drop.require_images(run.evaluation.count, run.task.name, options.evaluation is not None)
    run.annotations = _annotations(run)
    if run.task.name == CLASSIFIER:
        _check_labels(run.evaluation, run.outputs[0].shape[0])
    few = min(GOLDEN_IMAGES, per_pass(preprocessing, run.outputs))
    run.golden = next(run.evaluation.subset(0, few).batches(few))
    if inputs is not None:
        every = (_batches(run, each, torch.from_numpy) for each in (run.calibration, run.evaluation))
        require_readable(run.loaded.net, inputs, chain.from_iterable(every))
    join_outputs(run.loaded.net, torch.from_numpy(run.golden))
    run.model = QuantModel.of(run.name, run.loaded.net, precision=run.recipe.precision)
    halves = halves_of(run.calibration, lambda part: _batches(run, part, _to(run.device)))
    if (fitted := run.recipe.compensate) is not None and fitted.only_input:
        samples_where(
            run.loaded.net, halves, fitted.only_input, fitted.only_value
        )  # refused now, and not after minutes
    watch = Watch(folder=run.kept.folder and cache_folder("unfinished"))
    limit = options.limits.max_drop
    kept = None if limit is None else partial(keeps, limit, run.task)
    run.images = CalibrationImages(torch.from_numpy(run.golden[:1]), halves, watch, run.device, kept)
    run.key = run.kept.first_key(
        {
            "network": [run.spec.tag, run.spec.img_size, run.loaded.sha256],
            "images": run.calibration.sha256,
            "batch": per_pass(preprocessing, run.outputs), "seed": options.seed, "device": run.device.type,
            "precision": asdict(run.recipe.precision),
        }
    )  # fmt: skip
    found = f"{run.calibration.count} to calibrate, {run.evaluation.count} to judge; {run.calibration.source}"
    return (found,)


def fold(run: Run) -> Lines:
    """BatchNorm and LayerScale become part of the layers before them."""
    run.model = FOLD(run.model, run.images)
    if not run.model.layers:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(run.model.float_layers.items())[:3])
        raise UserError(
            f"{run.model.structure.kind} has no layer to quantize ({reasons or 'no Linear or Conv2d called in float32'})"
        )
    return run.model.history[-1].notes


def decide(run: Run, stage: Stage) -> Lines:
    """What `stage` makes of the model, or made of it before. Raises UserError if it lies before --from and is not kept."""
    before = run.model
    run.key = run.kept.key(run.key, stage.name, stage.options)
    found, why = (None, "") if run.anew else run.kept.load(before, stage.name, run.key)
    if found is not None:
        run.model, run.taken[stage.name] = found, run.key
        return found.history[-1].notes
    if run.options.begin and not run.anew:
        why = why or f"nothing kept for exactly this input ({run.key[:12]})"
        raise UserError(
            f"--from '{run.options.begin}' needs what '{stage.name}' decided: {why}; run without --from first"
        )
    with run.progress.steps() as at:
        run.model = stage(before, replace(run.images, watch=replace(run.images.watch, at=at)))
    said = run.kept.save(before, run.model, stage.name, run.key)
    return (*run.model.history[-1].notes, *filter(None, (why, said)))


def fits_fp16(run: Run) -> Lines:
    """Whether the activations of the float network fit FP16. Raises UserError if they do not, and have to."""
    few = _batches(run, run.calibration.subset(0, RANGE_IMAGES), _to(run.model.device))
    run.fp16_range = found = fp16_range(run.model.net, few, run.options.half)
    holds = f"FP16 holds {FP16_MAX:.0f}" if run.options.half else "types are FP32"
    return (
        f"the largest value is {found.largest:.4g}, in {found.module}; {holds}",
        *(found.warnings() if run.options.half else ()),
    )


def covers(run: Run) -> Lines:
    """How far other images exceed the calibrated ranges."""
    others = _batches(run, run.evaluation.subset(0, COVERAGE_IMAGES), _to(run.model.device))
    run.coverage = coverage(run.model, others)
    return (run.coverage.summary(), *run.coverage.warnings())


# The bridge.


def _example(run: Run) -> Example:
    """What an export is traced with: the size of images, or two samples of named inputs."""
    if run.loaded.inputs is not None:
        return torch.from_numpy(run.golden[[0, -1]])
    _, height, width = run.golden.shape[1:]
    return height, width


def export(run: Run) -> Lines:
    """The rounded network as ONNX, with FP16 and with FP32 types, and the float network."""
    run.model = run.model.to(CPU)
    run.simulation = quantized_net(run.model)
    example = _example(run)
    run.graph, run.fp32 = export_pair(run.simulation, example, run.options.half)
    run.graph_without_branches = None
    if run.model.branches:
        net = quantized_net(replace(run.model, branches={}))
        run.graph_without_branches = export_pair(net, example, run.options.half)[0 if run.backend.FP16 else 1]
    run.beyond_fp16 = _beyond_fp16(run.model.float_net)
    run.float_model = run.scratch / "float.onnx"
    onnx.save(run.graph, run.folder / MODEL)
    onnx.save(run.fp32, run.folder / MODEL_FP32)
    save(export_float(run.model.float_net, example), run.float_model)
    mb, float_mb = (run.folder / MODEL).stat().st_size / 1e6, stored_bytes(run.float_model) / 1e6
    return (f"{MODEL} {mb:.1f} MB, float {float_mb:.1f} MB",)


def _beyond_fp16(net: nn.Module) -> str:
    """Why the weights of `net` do not fit FP16 types; "" if they do."""
    try:
        require_fp16_weights(net)
    except UserError as error:
        return str(error)
    return ""


def agrees(run: Run) -> Lines:
    """Simulation and ONNX compute the same integers, or ContractError; frees the torch networks: the graphs remain."""
    run.parity = compare_with_onnx(run.simulation, run.fp32, run.golden)
    _hold(run.parity)
    run.golden_outputs = {
        **_named(GOLDEN_FLOAT, run.model.float_net, run.golden),
        **_named(GOLDEN_SIMULATED, run.simulation, run.golden),
    }
    run.model, run.loaded = run.model.without_networks(), replace(run.loaded, net=nn.Module())
    del run.simulation
    return (f"simulation and ONNX agree to {run.parity.rel_l2:.0e}",)


# The engine half.


def check(run: Run) -> Lines:
    """The graph is what a strongly typed engine wants; the layers it plans for INT8."""
    require_strongly_typed(run.graph, run.options.half)
    run.planned, run.planned_attention = planned_layers(run.graph), planned_attention(run.graph)
    attentions = len(run.planned_attention) // 2
    return (
        f"strongly typed {run.options.floats.upper()}; {len(run.planned)} INT8 layers, {attentions} INT8 attentions planned",
    )


def _built(run: Run, graph: onnx.ModelProto) -> tuple[Built, str, Lines]:
    """(the engine of `graph`, its key if it was kept, what to tell)."""
    return run.engines.built(run.backend, graph, run.options.built_for(), run.anew)


def _kernel_lists(run: Run) -> KernelLists:
    """The kernels of the engine, and of the same build of the float network with FP16 types, if it fits them."""
    if not run.backend.FP16:
        return KernelLists(
            run.built.kernels, None, f"engines of {run.backend.NAME} have FP32 types beside their integers"
        )
    if run.beyond_fp16:
        return KernelLists(run.built.kernels, None, run.beyond_fp16)
    try:
        twin, _, _ = _built(run, halved(onnx.load(run.float_model)))
    except UserError as error:
        return KernelLists(run.built.kernels, None, str(error))
    return KernelLists(run.built.kernels, twin.kernels)


def build(run: Run) -> Lines:
    """The engine; to tell what INT8 and branches cost, one in FP16 and one without branches."""
    run.built, kept, said = _built(run, run.graph if run.backend.FP16 else run.fp32)
    run.engine_without_branches = None
    if kept:
        run.taken["build"] = kept
    (run.folder / ENGINE).write_bytes(run.built.plan)
    write_json(run.folder / LAYERS, run.built.layers_json())
    lines = [f"{len(run.built.plan) / 1e6:.1f} MB for {', '.join(run.built.targets)}", *said, *run.built.notes]
    run.kernels = _kernel_lists(run)
    twin = f"no FP16 engine to compare with: {run.kernels.why_no_twin}"
    if run.kernels.fp16 is not None:
        twin = f"{len(run.built.kernels)} kernels, {len(run.kernels.fp16)} in FP16"
    lines.append(twin)
    if run.graph_without_branches is not None:
        run.engine_without_branches, _, _ = _built(run, run.graph_without_branches)
        lines.append(
            f"{len(run.built.kernels)} kernels with branches, {len(run.engine_without_branches.kernels)} without"
        )
    return lines


def prove(run: Run) -> Lines:
    """Every planned layer runs in an INT8 kernel, or ContractError; on a CPU some may lack one, which is a warning."""
    every, half = run.backend.FP16, run.options.half
    run.audit = proven(run.built, run.planned, run.planned_attention, run.final, every, half)
    return (run.audit.summary(),)


def verify(run: Run) -> Lines:
    """How near the graphs come to the float network on images that did not calibrate; ContractError if FP16 overflows."""
    labels = run.annotations if run.evaluation.labels is None else np.array(run.evaluation.labels)
    images = _batches(run, run.evaluation, partial(arrays_from_rows, run.loaded.inputs))
    run.reference = Reference(run.float_model, images, _golden(run), run.task, labels, run.evaluation.sources)
    run.verdict = verify_fidelity(run.folder, run.reference)
    _hold(run.verdict)
    if not run.loaded.random and (reason := run.verdict.no_longer_the_network()):
        raise ContractError(reason)
    return (f"{run.verdict.fidelity.sqnr_db:.1f} dB SQNR on {run.verdict.fidelity.count} images",)


def _golden(run: Run) -> Given:
    """The golden images as a graph takes them."""
    return arrays_from_rows(run.loaded.inputs, run.golden)


def _golden_inputs(run: Run) -> dict[str, np.ndarray]:
    """The golden images, for their file."""
    given = _golden(run)
    if isinstance(given, np.ndarray):
        return {GOLDEN_ONLY: given}
    return {f"{GOLDEN_INPUT}{name}": array for name, array in given.items()}


def _execution(run: Run) -> Execution:
    """The engine's outputs, or why there are none: an engine may be for other GPUs than the one here."""
    device = run.backend.device_name
    return executed_here(
        run.backend, run.built.plan, lambda engine: executed(engine, device(), run.folder, run.reference)
    )


def execute(run: Run) -> Lines:
    """What the engine itself computes, where it can run; ContractError if it is not what the graph computes."""
    run.execution = _execution(run)
    if reason := run.execution.failure(run.verdict):
        raise ContractError(reason)
    return (run.execution.summary(),)


def benchmark(run: Run) -> Lines:
    """The speed of both in ONNX Runtime."""
    run.speed = cpu_speed(run.folder, run.float_model, _golden(run))
    return (f"{run.speed.comparison.ratio:.2f}x float in ONNX Runtime on this CPU",)


def accept(run: Run) -> Lines:
    """Whether the limits that were given are kept: by the engine where it was run, else by its graph."""
    judged = run.execution.fidelity or run.verdict.fidelity
    run.acceptance = run.options.limits.check(judged, run.task.name, run.speed.comparison)
    return run.acceptance.lines() or ("no limits were given (MAX_DROP=, MIN_SPEEDUP=)",)


def package(run: Run) -> Lines:
    """What ships beside the engine: golden images with their outputs, report and manifest."""
    np.savez(run.folder / GOLDEN, **_golden_inputs(run), **run.golden_outputs)  # type: ignore[arg-type]
    write_json(run.folder / KERNELS, lists_to_json(run.kernels))
    run.report = report_json(run)
    write_json(run.folder / REPORT, run.report)
    manifest = manifest_json(run)
    write_json(run.folder / MANIFEST, manifest)
    return (f"{len(FILES)} files", *replaced(run.final, manifest))
