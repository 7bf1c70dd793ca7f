"""Pictures in 0..1, (N, 3, H, W), as super-resolution returns them."""

from typing import Any

import numpy as np

from calib.task import Task
from deploy.measure.outputs import Outputs, only

points_lost = None  # nothing is counted
WINDOW = 7  # pixels, of the structural similarity
MOST_DB = 100.0  # of two equal pictures, whose PSNR is infinite
MARGIN = 0.1  # beyond 0..1: as far as edges overshoot


def psnr_db(reference: np.ndarray, output: np.ndarray) -> float:
    """The mean over pictures of their peak signal-to-noise ratio (dB) at a peak of 1; values beyond 0..1 are clipped."""
    errors = (
        np.square(np.clip(reference, 0, 1, dtype=np.float64) - np.clip(output, 0, 1)).reshape(len(output), -1).mean(1)
    )
    return float(np.minimum(-10 * np.log10(np.maximum(errors, 1e-30)), MOST_DB).mean())


def ssim(reference: np.ndarray, output: np.ndarray) -> float | None:
    """The mean structural similarity of pictures (Wang et al., 2004), as scikit-image computes it; None of smaller ones."""
    if min(reference.shape[2:]) < WINDOW:
        return None
    from skimage.metrics import structural_similarity

    pairs = zip(np.clip(reference, 0, 1), np.clip(output, 0, 1), strict=True)
    return float(np.mean([structural_similarity(a, b, channel_axis=0, data_range=1.0) for a, b in pairs]))


def out_of_range(pictures: np.ndarray) -> float:
    """The share of values that lie further beyond 0..1 than edges overshoot: PSNR and SSIM, which clip them, miss these."""
    return float(np.mean((pictures < -MARGIN) | (pictures > 1 + MARGIN)))


def measures(reference: Outputs, output: Outputs, _task: Task, _labels: Any) -> dict[str, Any]:
    """Return how near the pictures of a network come to those of the float network."""
    exact, found = only(reference), only(output)
    return {"psnr_db": psnr_db(exact, found), "ssim": ssim(exact, found), "out_of_range": out_of_range(exact)}
