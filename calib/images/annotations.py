"""Boxes that people drew: COCO's annotations of the images in a folder, as boxes in the image that a network reads."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calib.errors import UserError
from calib.images.preprocess import Preprocessing, placed

FORM = "expected COCO's: lists 'images', 'annotations' and 'categories'"
LEFT, TOP, RIGHT, BOTTOM, CLASS, CROWD = range(6)  # columns of a row


def annotations_of(folder: Path) -> Path | None:
    """The annotations of a folder of images: its one .json file, or annotations/instances_<name>.json beside it (COCO).

    None without, or where it is no folder. Raises UserError if it holds several.
    """
    if not folder.is_dir():
        return None
    inside = sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))
    if len(inside) > 1:
        raise UserError(
            f"'{folder}' holds {len(inside)} .json files ({', '.join(path.name for path in inside[:3])}): expected one with "
            f"the boxes of its images"
        )
    beside = folder.resolve().parent / "annotations" / f"instances_{folder.resolve().name}.json"
    return inside[0] if inside else beside if beside.is_file() else None


def _lists(path: Path) -> tuple[list[Mapping[str, Any]], ...]:
    """The three lists of the file. Raises UserError if it does not hold them."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read as JSON ({error}): {FORM}") from error
    found = [
        content.get(name) if isinstance(content, dict) else None for name in ("images", "annotations", "categories")
    ]
    if not all(isinstance(each, list) and all(isinstance(one, dict) for one in each) for each in found):
        raise UserError(f"'{path}' holds no annotations of boxes: {FORM}")
    return tuple(found)  # type: ignore[arg-type]


def _indices(
    path: Path, categories: Sequence[Mapping[str, Any]], classes: int, background: int | None
) -> dict[int, int]:
    """The class of every category: by order of their ids where there are as many, or the id itself where it is below.

    `background`: the index of the class that is none. Raises UserError where neither holds.
    """
    ids = sorted(each["id"] for each in categories)
    named = [index for index in range(classes) if background is None or index != background % classes]
    if len(ids) == len(named):
        return dict(zip(ids, named, strict=True))
    if ids and ids[-1] < classes:
        return {each: each for each in ids}
    raise UserError(
        f"'{path}' has {len(ids)} categories with ids to {ids[-1] if ids else 0}, the network {len(named)} classes: "
        f"expected as many, or ids that are its classes"
    )


def boxes_from_coco(
    path: Path, names: Sequence[str], preprocessing: Preprocessing, classes: int, background: int | None = None
) -> list[np.ndarray]:
    """The boxes of the images `names`, (K, 6) each: left, top, right, bottom in pixels that the network reads, class, crowd.

    Of boxes that the preprocessing cuts the rest is kept. Raises UserError for a file of another form, and for an image that
    it does not know.
    """
    images, annotations, categories = _lists(path)
    try:
        of_class = _indices(path, categories, classes, background)
        sizes = {str(each["file_name"]): (each["id"], float(each["width"]), float(each["height"])) for each in images}
        rows: dict[Any, list[tuple[float, ...]]] = defaultdict(list)
        for each in annotations:
            x, y, width, height = map(float, each["bbox"])
            kind, crowd = of_class[each["category_id"]], bool(each.get("iscrowd", 0))
            rows[each["image_id"]].append((x, y, x + width, y + height, kind, crowd))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"'{path}' has an entry without {error}, or with one of another form: {FORM}") from error
    found = []
    for name in names:
        if name not in sizes:
            raise UserError(
                f"'{path}' does not know the image '{name}': expected all images of the folder as file_name"
            )
        image, width, height = sizes[name]
        table = np.array(rows[image], np.float64).reshape(-1, 6)
        table[:, :4] = placed(table[:, :4], (width, height), preprocessing)
        found.append(table[(table[:, RIGHT] > table[:, LEFT]) & (table[:, BOTTOM] > table[:, TOP])])
    return found
