"""The fidelity of a quantized network: how close its outputs are to those of the float network."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from calib.task import Task
from deploy.measure.outputs import Outputs
from deploy.measure.tasks import task_module
from deploy.measure.tasks.features import unit

MAX_SQNR_DB = 200.0  # far beyond float32, and JSON has no infinity
RESAMPLES = 1000  # of the source images, for the interval


@dataclass(frozen=True)
class Fidelity:
    """The agreement of a network with its reference over `count` images.

    `sqnr_db`: 10 log10(|reference|^2 / |difference|^2) over all images; several outputs count alike (`joined_rows`), and
    `outputs` holds the SQNR of each. `cosine`: mean over images. `top1_agreement`: share of images with the same top-1
    result: the class of a classifier, or for features the nearest other image by cosine (`top1_kind` says which); None
    for outputs of another kind. `kl`: mean KL(reference || network) of the class probabilities in nats, None without
    classes. `psnr_db`, `ssim`: of pictures to the float network's, None for other outputs; `out_of_range`: the share of the
    float network's values that lie clearly beyond 0..1, which these clip. `boxes`: those that the float
    network is certain of; `ap50`, `ap`: average precision beside them at an overlap of .5, and its mean over .5 to .95;
    `lost`: boxes without a counterpart, `moved_px`: median distance of the others' sides in pixels (tasks/boxes.py).
    `true_ap`, `reference_true_ap`: average precision beside annotated boxes. `top1`, `reference_top1`: accuracy on
    labels. Both are None without labels. `sources`: number of source images, `sqnr_interval_db`: 95 % bootstrap interval
    of `sqnr_db` over them; None where the source images are not known.
    """

    count: int
    sqnr_db: float
    cosine: float
    outputs: dict[str, float] = field(default_factory=dict)
    top1_agreement: float | None = None
    top1_kind: str | None = None
    kl: float | None = None
    top1: float | None = None
    reference_top1: float | None = None
    psnr_db: float | None = None
    ssim: float | None = None
    out_of_range: float | None = None
    boxes: int | None = None
    ap50: float | None = None
    ap: float | None = None
    lost: int | None = None
    moved_px: float | None = None
    true_ap: float | None = None
    reference_true_ap: float | None = None
    sources: int | None = None
    sqnr_interval_db: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """The fidelity as plain values, for the report."""
        return asdict(self)


def powers(reference: np.ndarray, output: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums of squares of `reference` and of its difference from `output` (N, ...) by row, (N,) each.

    Rows are looked at one by one: the outputs of many images would take much memory in float64.
    """
    signal, noise = np.zeros(len(reference)), np.zeros(len(reference))
    for row, (exact, found) in enumerate(zip(reference, output, strict=True)):
        exact = exact.astype(np.float64)
        signal[row], noise[row] = np.square(exact).sum(), np.square(exact - found).sum()
    return signal, noise


def _db(signal: float, noise: float) -> float:
    return MAX_SQNR_DB if noise == 0 else min(float(10 * np.log10(signal / noise)), MAX_SQNR_DB)


def sqnr_db(reference: np.ndarray, output: np.ndarray) -> float:
    """The signal to quantization-noise ratio in dB over all elements, at most MAX_SQNR_DB; NaN if an element is NaN."""
    of_one = reference.ndim == 1
    signal, noise = powers(reference[None], output[None]) if of_one else powers(reference, output)
    return _db(signal.sum(), noise.sum())


def mean_sqnr_db(reference: np.ndarray, output: np.ndarray) -> float:
    """The mean over images of `sqnr_db` (dB): unlike `sqnr_db` of all, one image with much noise cannot dominate it."""
    return float(np.mean([_db(*row) for row in zip(*powers(reference, output), strict=True)]))


def sqnr_interval_db(reference: np.ndarray, output: np.ndarray, sources: Sequence[int]) -> tuple[float, float]:
    """Return the 95 % interval of `sqnr_db` when source images, with all their rows, are drawn anew (bootstrap).

    `sources` (N,): the number of the source image of every row. The draws are seeded, so the interval is reproducible.
    """
    of_row = np.unique(np.asarray(sources), return_inverse=True)[1]
    signal, noise = (np.bincount(of_row, each) for each in powers(reference, output))
    generator = np.random.default_rng(0)
    found = []
    for _ in range(RESAMPLES):
        drawn = generator.integers(0, len(signal), len(signal))
        found.append(MAX_SQNR_DB if not noise[drawn].any() else 10 * np.log10(signal[drawn].sum() / noise[drawn].sum()))
    low, high = np.quantile(found, [0.025, 0.975])
    return min(float(low), MAX_SQNR_DB), min(float(high), MAX_SQNR_DB)


def relative_l2(reference: np.ndarray, output: np.ndarray) -> float:
    """The relative L2 difference |output - reference| / |reference| over all elements; of zeros it is 0 or infinite."""
    reference = reference.astype(np.float64)
    noise, signal = (float(np.linalg.norm(each)) for each in (output - reference, reference))
    return noise / signal if signal else (math.inf if noise else 0.0)


def joined_rows(outputs: Outputs, sizes: Outputs | None = None) -> np.ndarray:
    """Return one row of values per image (N, D): the output, or of several each divided by its size and flattened.

    The size of an output is its root mean square in `sizes`, by default its own.
    """
    if len(outputs) == 1:
        (only,) = outputs.values()
        return only.reshape(len(only), -1)
    rows = []
    for name, value in outputs.items():
        size = np.sqrt(np.square((sizes or outputs)[name], dtype=np.float64).mean())
        rows.append((value / (size or 1.0)).reshape(len(value), -1))
    return np.concatenate(rows, 1)


def mean_cosine(reference: np.ndarray, output: np.ndarray) -> float:
    """The mean over rows (N, D) of their cosine; 1 for a row that is zero in both."""
    cosines = [
        float((unit(exact[None]) * unit(found[None])).sum()) if exact.any() or found.any() else 1.0
        for exact, found in zip(reference, output, strict=True)
    ]
    return float(np.mean(cosines))


def fidelity(
    reference: Outputs,
    output: Outputs,
    task: Task,
    labels: Any = None,
    sources: Sequence[int] | None = None,
) -> Fidelity:
    """Compare `output` with `reference`, both with one entry per image on the first axis of every output.

    `task`: what the outputs are. `labels`: class indices (N,) of a classifier, or of a detector N tables of annotated boxes
    (calib/images/annotations.py). `sources` (N,): the numbers of the images' source images.
    """
    exact, found = joined_rows(reference), joined_rows(output, reference)
    return Fidelity(
        count=len(found),
        sqnr_db=sqnr_db(exact, found),
        cosine=mean_cosine(exact, found),
        outputs={name: sqnr_db(value, output[name]) for name, value in reference.items()},
        sources=None if sources is None else len(set(sources)),
        sqnr_interval_db=None if sources is None else sqnr_interval_db(exact, found, sources),
        **task_module(task.name).measures(reference, output, task, labels),
    )
