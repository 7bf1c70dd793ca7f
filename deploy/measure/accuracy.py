"""The fidelity of a quantized network: how close its outputs are to those of the float network.

Outputs have one row per image: logits (N, classes) of a classifier, features (N, D) of a network without a head.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

MAX_SQNR_DB = 200.0  # far beyond float32, and JSON has no infinity
RESAMPLES = 1000  # of the source images, for the interval
NEIGHBOUR_ROWS = 1024  # nearest neighbours are searched among the first rows only: cost grows with the square


@dataclass(frozen=True)
class Fidelity:
    """The agreement of a network with its reference over `count` images.

    `sqnr_db`: 10 log10(|reference|^2 / |difference|^2) over all rows. `cosine`: mean over images.
    `top1_agreement`: share of images with the same top-1 result: the class of a classifier, or for features the
    nearest other image by cosine (`top1_kind` says which). `kl`: mean KL(reference || network) of the class
    probabilities in nats, None for features. `top1`, `reference_top1`: accuracy on labels, None without labels.
    `sources`: number of source images, `sqnr_interval_db`: 95 % bootstrap interval of `sqnr_db` over them; None where
    the source images are not known.
    """

    count: int
    sqnr_db: float
    cosine: float
    top1_agreement: float
    top1_kind: str
    kl: float | None = None
    top1: float | None = None
    reference_top1: float | None = None
    sources: int | None = None
    sqnr_interval_db: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """The fidelity as plain values, for the report."""
        return asdict(self)


def sqnr_db(reference: np.ndarray, output: np.ndarray) -> float:
    """The signal to quantization-noise ratio in dB over all elements, at most MAX_SQNR_DB; NaN if an element is NaN."""
    noise = float(((reference.astype(np.float64) - output) ** 2).sum())
    signal = float((reference.astype(np.float64) ** 2).sum())
    return MAX_SQNR_DB if noise == 0 else min(float(10 * np.log10(signal / noise)), MAX_SQNR_DB)


def mean_sqnr_db(reference: np.ndarray, output: np.ndarray) -> float:
    """The mean over images of `sqnr_db` (dB): unlike `sqnr_db` of all, one image with much noise cannot dominate it."""
    return float(np.mean([sqnr_db(*rows) for rows in zip(reference, output, strict=True)]))


def sqnr_interval_db(reference: np.ndarray, output: np.ndarray, sources: Sequence[int]) -> tuple[float, float]:
    """Return the 95 % interval of `sqnr_db` when source images, with all their rows, are drawn anew (bootstrap).

    `sources` (N,): the number of the source image of every row. The draws are seeded, so the interval is reproducible.
    """
    of_row = np.unique(np.asarray(sources), return_inverse=True)[1]
    signal = np.bincount(of_row, (reference.astype(np.float64) ** 2).sum(1))
    noise = np.bincount(of_row, ((reference.astype(np.float64) - output) ** 2).sum(1))
    generator = np.random.default_rng(0)
    found = []
    for _ in range(RESAMPLES):
        drawn = generator.integers(0, len(signal), len(signal))
        found.append(MAX_SQNR_DB if not noise[drawn].any() else 10 * np.log10(signal[drawn].sum() / noise[drawn].sum()))
    low, high = np.quantile(found, [0.025, 0.975])
    return min(float(low), MAX_SQNR_DB), min(float(high), MAX_SQNR_DB)


def relative_l2(reference: np.ndarray, output: np.ndarray) -> float:
    """The relative L2 difference |output - reference| / |reference| over all elements."""
    reference = reference.astype(np.float64)
    return float(np.linalg.norm(output - reference) / np.linalg.norm(reference))


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float64).tiny)


def nearest_neighbours(features: np.ndarray) -> np.ndarray:
    """The index (N,) of the most similar other row (by cosine) for each row of `features` (N, D)."""
    unit = _unit(features)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    return similarity.argmax(1)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def fidelity(
    reference: np.ndarray,
    output: np.ndarray,
    classifier: bool,
    labels: np.ndarray | None = None,
    sources: Sequence[int] | None = None,
) -> Fidelity:
    """Compare `output` with `reference`, both (N, D).

    `labels` (N,) are class indices of a classifier, `sources` (N,) the numbers of the rows' source images.
    """
    interval = None if sources is None else sqnr_interval_db(reference, output, sources)
    count = None if sources is None else len(set(sources))
    cosine = float((_unit(reference) * _unit(output)).sum(1).mean())
    if not classifier:
        rows = slice(0, NEIGHBOUR_ROWS)
        agreement = float((nearest_neighbours(reference[rows]) == nearest_neighbours(output[rows])).mean())
        return Fidelity(len(output), sqnr_db(reference, output), cosine, agreement, "nearest neighbour",
                        sources=count, sqnr_interval_db=interval)  # fmt: skip
    winner, reference_winner = output.argmax(1), reference.argmax(1)
    p, q = _log_softmax(reference), _log_softmax(output)
    return Fidelity(
        count=len(output),
        sqnr_db=sqnr_db(reference, output),
        cosine=cosine,
        top1_agreement=float((winner == reference_winner).mean()),
        top1_kind="class",
        kl=float((np.exp(p) * (p - q)).sum(1).mean()),
        top1=None if labels is None else float((winner == labels).mean()),
        reference_top1=None if labels is None else float((reference_winner == labels).mean()),
        sources=count,
        sqnr_interval_db=interval,
    )
