"""`python -m benchmarks.stage_cost MODEL RECIPE`: what the stages of a recipe cost, in float passes over the images.

Writes `results/stage_cost.<model>.json`, which holds the last figures of each recipe. Absolute seconds depend on the
machine and on who else uses it; a float pass before and one after the stages, in the same process on the same
images, make them comparable.
"""

import json
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calib.images.batches import Batches as AnyBatches
from calib.images.image_set import image_sets
from calib.images.preprocess import preprocessing_from_config
from calib.quant_model import QuantModel
from calib.weights.load import load_net
from calib.weights.zoo import resolve_model
from deploy import host
from deploy.options import Options
from deploy.progress import Progress
from deploy.recipe import load_recipe
from deploy.report.evidence import peak_rss_mb, tool_commit
from deploy.stages import CalibrationImages, halves_of, stages
from deploy.steps import Batches

RESULTS = Path(__file__).parent / "results"
USAGE = "usage: python -m benchmarks.stage_cost MODEL RECIPE"


def float_pass(net: nn.Module, parts: Iterable[AnyBatches]) -> float:
    """Return the seconds that `net` takes for all images of `parts`."""
    start = time.perf_counter()
    with torch.inference_mode():
        for batches in parts:
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
    halves = halves_of(calibration, lambda part: Batches(part, progress, torch.from_numpy))
    images = CalibrationImages(next(iter(halves[0]))[:1], halves)
    model = QuantModel.of(name, loaded.net, precision=recipe.precision)
    passes = []
    with progress.stage("float"):
        passes.append(float_pass(loaded.net, halves))
    seconds = {}
    for stage in stages(recipe):
        with progress.stage(stage.name) as note:
            start = time.perf_counter()
            model = stage.run(model, images)
            seconds[stage.name] = time.perf_counter() - start
            note(*model.history[-1].notes)
    with progress.stage("float"):
        passes.append(float_pass(loaded.net, halves))
    one = sum(passes) / len(passes)
    return {
        "model": name, "recipe": recipe.name, "images": calibration.count, "float_pass_s": passes,
        "stage_s": seconds, "stage_passes": {stage: spent / one for stage, spent in seconds.items()},
        "total_passes": sum(seconds.values()) / one, "peak_rss_mb": peak_rss_mb(),
        "machine": host.describe(), "commit": tool_commit(),
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    """Measure one recipe in this process, so that its peak memory is its own."""
    if len(arguments) != 2:
        print(USAGE, file=sys.stderr)
        return 2
    model, recipe = arguments
    result = measure(model, recipe) | {
        "command": f"python -m benchmarks.stage_cost {model} {recipe}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    path = RESULTS / f"stage_cost.{model}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(kept | {recipe: result}, indent=2) + "\n")
    for stage, passes in result["stage_passes"].items():
        print(f"{stage:18}{result['stage_s'][stage]:7.1f} s {passes:6.2f} float passes")
    print(f"{'together':18}{'':10}{result['total_passes']:6.2f} float passes; peak {result['peak_rss_mb']:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
