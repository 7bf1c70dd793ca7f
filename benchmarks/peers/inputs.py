"""The inputs of another quantization tool for a fair comparison: the float graph and the images that this tool uses.

`python -m benchmarks.peers.inputs MODEL FOLDER` writes into FOLDER:
    float.onnx   FP32, opset 21, dynamic batch, BatchNorm not folded
    calib.npy    float32 (N, 3, height, width), preprocessed
    eval.npy     float32 (M, 3, height, width), preprocessed, from other source images
    about.json   the origin of weights and images, and the machine
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch

from calib.errors import UserError
from calib.images.image_set import ImageSet, image_sets
from calib.images.preprocess import preprocessing_from_config
from calib.outputs import outputs_of, task_of
from calib.weights.load import load_net
from calib.weights.zoo import resolve_model
from deploy import host
from deploy.bridge.export import export_float
from deploy.package import write_json
from deploy.report.evidence import tool_commit

FLOAT, CALIBRATION, EVALUATION, ABOUT = "float.onnx", "calib.npy", "eval.npy", "about.json"


def _save(images: ImageSet, path: Path) -> dict[str, str | int]:
    np.save(path, next(images.batches(images.count)))
    return {"source": images.source, "count": images.count, "sha256": images.sha256}


def write_inputs(model: str, folder: Path, calib_images: int, eval_images: int) -> None:
    """Write the four files above for `model` with its default weights and the built-in sample images.

    Raises UserError for an unknown model, weights that cannot be fetched, or a number of images below 1.
    """
    loaded = load_net(resolve_model(model))
    preprocessing = preprocessing_from_config(loaded.data_config)
    calibration, evaluation = image_sets(None, None, preprocessing, calib_images, eval_images)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(export_float(loaded.net, (preprocessing.height, preprocessing.width)), folder / FLOAT)
    about = {
        "model": model,
        "weights_source": loaded.source,
        "task": task_of(loaded.net, outputs_of(loaded.net, torch.zeros(2, *loaded.data_config["input_size"]))).name,
        "calibration": _save(calibration, folder / CALIBRATION),
        "evaluation": _save(evaluation, folder / EVALUATION),
        "machine": host.describe(),
        "commit": tool_commit(),
    }
    write_json(folder / ABOUT, about)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the inputs; returns the exit code, 0 or (for bad input, with one line on stderr) 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.inputs", description=write_inputs.__doc__)
    parser.add_argument("model", help="short name (see `python -m deploy list`) or any timm name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--calib-images", type=int, default=64)
    parser.add_argument("--eval-images", type=int, default=128)
    args = parser.parse_args(argv)
    try:
        write_inputs(args.model, args.folder, args.calib_images, args.eval_images)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
