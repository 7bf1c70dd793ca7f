"""What the stages of a recipe cost, in float passes: seconds beside those of the float network on the same images.

    python -m deploy.stage_cost MODEL RECIPE

prints JSON. Absolute seconds depend on the machine and on who else uses it; a float pass before and one after the stages, in
the same process on the same images, make them comparable.
"""

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from calib.batches import Batches as AnyBatches
from calib.families import family_of
from calib.images import image_sets
from calib.preprocess import preprocessing_from_config
from calib.quant_model import QuantModel
from calib.weights import load_net
from calib.zoo import resolve_model
from deploy import host
from deploy.pipeline import Batches, Options
from deploy.progress import Progress
from deploy.recipe import load_recipe
from deploy.report import peak_rss_mb, tool_commit
from deploy.simulation import CalibrationImages, stages


def float_pass(net: nn.Module, folds: Sequence[AnyBatches]) -> float:
    """Seconds of `net` for all images of `folds`."""
    start = time.perf_counter()
    with torch.inference_mode():
        for batches in folds:
            for batch in batches:
                net(batch)
    return time.perf_counter() - start


def measure(name: str, recipe_name: str) -> dict[str, Any]:
    """Seconds and float passes by stage, on the images `make engine` would take."""
    spec, recipe, options = resolve_model(name), load_recipe(recipe_name), Options(model=name)
    progress = Progress(f"{name}, recipe {recipe.name}: stages in float passes")
    loaded = load_net(spec, options.weights, options.seed)
    preprocessing = preprocessing_from_config(loaded.data_config)
    calibration, _ = image_sets(None, None, preprocessing, options.calib_images, seed=options.seed)
    folds = [Batches(part, progress, torch.from_numpy) for part in calibration.folds()]
    whole = Batches(calibration.folds(1)[0], progress, torch.from_numpy)
    images = CalibrationImages(next(iter(folds[0]))[:1], folds, whole)
    model = QuantModel(name, loaded.net, loaded.net, family_of(loaded.net), precision=recipe.precision)
    passes = []
    with progress.stage("float"):
        passes.append(float_pass(loaded.net, folds))
    seconds = {}
    for stage in stages(recipe):
        with progress.stage(stage.name) as note:
            start = time.perf_counter()
            model = stage.run(model, images)
            seconds[stage.name] = time.perf_counter() - start
            note(*model.history[-1].notes)
    with progress.stage("float"):
        passes.append(float_pass(loaded.net, folds))
    one = sum(passes) / len(passes)
    return {
        "model": name, "recipe": recipe.name, "images": calibration.count, "float_pass_s": passes,
        "stage_s": seconds, "stage_passes": {stage: spent / one for stage, spent in seconds.items()},
        "total_passes": sum(seconds.values()) / one, "peak_rss_mb": peak_rss_mb(),
        "machine": host.describe(), "commit": tool_commit(),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
