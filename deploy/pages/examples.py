"""The golden images, with what the float network and the INT8 network answer."""

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from deploy.measure.accuracy import joined_rows, sqnr_db
from deploy.package import GOLDEN
from deploy.pages.contents import Contents
from deploy.pages.parts import Line
from deploy.pages.values import Figure

MOST = 8
EDGE = 112  # of a thumbnail, in pixels


@dataclass(frozen=True)
class Example:
    """An image as a data URI and what is said of it."""

    picture: str
    lines: tuple[Line, ...]


def _thumbnail(image: np.ndarray, mean: np.ndarray, std: np.ndarray) -> str:
    """A data URI of a preprocessed `image` (3, H, W)."""
    pixels = (image.transpose(1, 2, 0) * std + mean).clip(0, 1) * 255
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    picture.thumbnail((EDGE, EDGE))
    held = io.BytesIO()
    picture.save(held, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"


def _top1(logits: np.ndarray) -> Line:
    """The class with the largest of `logits` (C,), and its probability."""
    raised = np.exp(logits.astype(np.float64) - logits.max())
    best, probability = int(logits.argmax()), float(raised.max() / raised.sum())
    return ("class ", Figure(f"{best}", best, GOLDEN), " (", Figure(f"{probability:.1%}", probability, GOLDEN), ")")


def _answers(contents: Contents, index: int) -> tuple[Line, ...]:
    """What both networks say of a golden image."""
    exact, simulated = joined_rows(contents.exact), joined_rows(contents.simulated, contents.exact)
    db = sqnr_db(exact[index], simulated[index])
    lines: tuple[Line, ...] = (("SQNR ", Figure(f"{db:.1f} dB", db, GOLDEN)),)
    if contents.manifest.text("task") != "classifier" or len(contents.exact) != 1:
        return lines
    return (("float ", *_top1(exact[index])), ("INT8 ", *_top1(simulated[index])), *lines)


def examples(contents: Contents) -> tuple[Example, ...]:
    """The first golden images; none where they are arrays by name, or have no three channels that could be shown."""
    if not isinstance(contents.images, np.ndarray) or contents.images.shape[1] != 3:
        return ()
    preprocessing = contents.manifest.part("preprocessing")
    mean, std = (np.array([preprocessing.number(name, channel) for channel in range(3)]) for name in ("mean", "std"))
    return tuple(
        Example(_thumbnail(image, mean, std), _answers(contents, index))
        for index, image in enumerate(contents.images[:MOST])
    )
