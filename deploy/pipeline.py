"""The spine: from a model name to a verified INT8 engine, stage by stage. Read this file first, then simulation.py.

torch half:   load -> fold -> equalise -> calibrate -> range -> reduce error -> coverage
bridge:       export -> parity
engine half:  check -> build -> audit -> verify -> benchmark -> package
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from calib.cache import Cache
from calib.families import family_of
from calib.images.image_set import ImageSet, image_sets
from calib.images.preprocess import preprocessing_from_config
from calib.network.fp16_range import fp16_range
from calib.network.qdq import quantized_net
from calib.quant_model import QuantModel
from calib.scales.coverage import coverage
from calib.store.user_cache import cache_folder
from calib.store.watch import Watch
from calib.weights.load import load_net
from calib.weights.zoo import resolve_model
from deploy.bridge.export import export_float, export_fp16, export_pair
from deploy.bridge.parity import compare_with_onnx
from deploy.engine.audit import audit, planned_attention, planned_layers, require_int8
from deploy.engine.backends import choose_backend
from deploy.errors import ContractError
from deploy.graph.check import require_strongly_typed
from deploy.options import Options
from deploy.package import ENGINE, GOLDEN, MANIFEST, MODEL, MODEL_FP32, REPORT, staging, write_json
from deploy.progress import Progress
from deploy.recipe import load_recipe
from deploy.report.evidence import Evidence, report_json
from deploy.report.manifest import manifest_json
from deploy.stages import FOLD, CalibrationImages, Stage, halves_of, repair_stages, scale_stages
from deploy.verify import cpu_speed, verify_fidelity

BATCH = 16  # images per forward pass on the CPU
GOLDEN_IMAGES = 8
RANGE_IMAGES = 32  # calibration images the float network must fit FP16 on
COVERAGE_IMAGES = 64  # most evaluation images looked at for values outside the calibrated ranges


class Batches:
    """The images of a set as re-iterable arrays (B, 3, H, W), with a progress bar on each pass."""

    def __init__(self, images: ImageSet, progress: Progress, convert: Callable[[np.ndarray], Any]) -> None:
        self.images, self.progress, self.convert = images, progress, convert

    def __iter__(self) -> Iterator[Any]:
        for batch in self.progress.bar(self.images.batches(BATCH), len(self)):
            yield self.convert(batch)

    def __len__(self) -> int:
        return -(-self.images.count // BATCH)


def _first_images(images: ImageSet, count: int) -> np.ndarray:
    return next(images.subset(0, count).batches(count))


def _float_outputs(net: nn.Module, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return net(torch.from_numpy(images)).numpy()


def _step(progress: Progress, stage: Stage, model: QuantModel, images: CalibrationImages) -> QuantModel:
    """What `stage` makes of `model`, with its notes shown."""
    with progress.stage(stage.name) as note, progress.steps() as at:
        model = stage.run(model, replace(images, watch=replace(images.watch, at=at)))
        note(*model.history[-1].notes)
    return model


def _hold(contract: Any) -> None:
    if reason := contract.failure():
        raise ContractError(reason)


def engine(options: Options) -> tuple[Path, dict[str, Any]]:
    """Run every stage. Returns the package's folder and the report.

    Raises UserError for bad input and ContractError if the result does not hold; nothing is left behind then.
    """
    spec = resolve_model(options.model)
    recipe = load_recipe(options.recipe).for_engine().limited(options.max_extra_kernels, options.max_extra_bytes)
    backend, why = choose_backend(options.target)
    name = spec.name.replace("/", "_") + ("-random-weights" if options.weights == "random" else "")
    final = Path(options.out) / name / recipe.name
    progress = Progress(f"{name}, recipe {recipe.name}, backend {backend.NAME} ({why})")

    with staging(final) as folder, tempfile.TemporaryDirectory() as scratch:
        with progress.stage("load") as note:
            loaded = load_net(spec, options.weights, options.seed)
            family = family_of(loaded.net)
            note(loaded.source)
        with progress.stage("images") as note:
            preprocessing = preprocessing_from_config(loaded.data_config)
            calibration, evaluation = image_sets(
                options.calib, options.evaluation, preprocessing, options.calib_images, seed=options.seed
            )
            golden = _first_images(evaluation, GOLDEN_IMAGES)
            note(f"{calibration.count} to calibrate, {evaluation.count} to judge; {calibration.source}")

        halves = halves_of(calibration, lambda part: Batches(part, progress, torch.from_numpy))
        watch = Watch(folder=cache_folder("unfinished") if options.cache else None)
        images = CalibrationImages(torch.from_numpy(golden[:1]), halves, watch)
        model = QuantModel.of(name, loaded.net, family, recipe.precision)
        model = _step(progress, FOLD, model, images)
        cache = Cache(
            {
                "network": [spec.tag, spec.img_size, loaded.sha256],
                "images": calibration.sha256,
                "batch": BATCH, "seed": options.seed, "precision": asdict(recipe.precision),
                "equalise": recipe.equalise and asdict(recipe.equalise),
                "attention": recipe.attention and asdict(recipe.attention), "calibrate": asdict(recipe.calibrate),
            },
            cache_folder("calibration") if options.cache else None,
        )  # fmt: skip
        with progress.stage("cache") as note:
            cached, said = cache.replayed(model)
            note(said)
        if cached:
            model = cached
        else:
            for stage in scale_stages(recipe):
                model = _step(progress, stage, model, images)
            with progress.stage("keep") as note:
                note(cache.save(model))
        with progress.stage("range") as note:
            few = Batches(calibration.subset(0, RANGE_IMAGES), progress, torch.from_numpy)
            in_fp16 = fp16_range(model.net, few)
            note(f"fits FP16 {in_fp16.headroom:.0f} times over: {in_fp16.largest:.4g} in {in_fp16.module}")
            note(*in_fp16.warnings())
        for stage in repair_stages(recipe):
            model = _step(progress, stage, model, images)
        with progress.stage("coverage") as note:
            others = Batches(evaluation.subset(0, COVERAGE_IMAGES), progress, torch.from_numpy)
            covered = coverage(model, others)
            note(covered.summary(), *covered.warnings())

        with progress.stage("export") as note:
            simulation = quantized_net(model)
            size = (preprocessing.height, preprocessing.width)
            fp16, fp32 = export_pair(simulation, size)
            onnx.save(fp16, folder / MODEL)
            onnx.save(fp32, folder / MODEL_FP32)
            float_model = Path(scratch) / "float.onnx"
            onnx.save(export_float(model.float_net, size), float_model)
            note(
                f"{MODEL} {(folder / MODEL).stat().st_size / 1e6:.1f} MB, float {float_model.stat().st_size / 1e6:.1f} MB"
            )
        with progress.stage("parity") as note:
            parity = compare_with_onnx(simulation, fp32, golden)
            _hold(parity)
            note(f"simulation and ONNX agree to {parity.rel_l2:.0e}")

        with progress.stage("check") as note:
            require_strongly_typed(fp16)
            planned = planned_layers(fp16)
            products = planned_attention(fp16)
            note(f"strongly typed FP16; {len(planned)} INT8 layers, {len(products) // 2} INT8 attentions planned")
        with progress.stage("build") as note:
            built = backend.build(fp16, options.profile, options.sms)
            (folder / ENGINE).write_bytes(built.plan)
            note(f"{len(built.plan) / 1e6:.1f} MB for {', '.join(built.targets)}", *built.notes)
            plain = None
            if model.branches:
                plain_graph = export_fp16(quantized_net(replace(model, branches={})), size)
                plain = backend.build(plain_graph, options.profile, options.sms)
                note(f"{len(built.kernels)} kernels with branches, {len(plain.kernels)} without")
        with progress.stage("audit") as note:
            audited = audit(built.kernels, planned, products)
            require_int8(audited)
            note(audited.summary())
        with progress.stage("verify") as note:
            verdict = verify_fidelity(
                folder, float_model, Batches(evaluation, progress, np.asarray), golden, model.is_classifier,
                None if evaluation.labels is None else np.array(evaluation.labels),
            )  # fmt: skip
            _hold(verdict)
            note(f"{verdict.fidelity.sqnr_db:.1f} dB SQNR on {verdict.fidelity.count} images")
        with progress.stage("benchmark") as note:
            speed = cpu_speed(folder, float_model, golden)
            note(f"{speed.comparison.ratio:.2f}x float in ONNX Runtime on this CPU")

        evidence = Evidence(
            options, recipe, loaded, calibration, evaluation, model, cache.key if cached else None, in_fp16, covered,
            parity, planned, built, plain, audited, verdict, speed, float_model.stat().st_size, progress.seconds,
        )  # fmt: skip
        np.savez(
            folder / GOLDEN,
            images=golden,
            float_output=_float_outputs(model.float_net, golden),
            simulated_output=_float_outputs(simulation, golden),
        )
        report = report_json(evidence, folder)
        write_json(folder / REPORT, report)
        write_json(folder / MANIFEST, manifest_json(evidence, folder))
    return final, report
