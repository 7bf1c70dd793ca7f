"""What the outputs of a network are: the task that its results are judged by. No torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from calib.errors import UserError, suggestion

CLASSIFIER, FEATURES, PICTURES, BOXES = "classifier", "features", "pictures", "boxes"
TOKENS, VALUES = "tokens", "values"
CORNERS, CENTERS, DELTAS, BINS = "corners", "centers", "deltas", "bins"
SIGMOID, SOFTMAX = "sigmoid", "softmax"
FORMS = (CORNERS, CENTERS, DELTAS, BINS)
EXPECTED = "expected a dictionary as docs/models.md describes it, such as {'form': 'corners', 'classes': 80}"
SCORES, PLACES = "scores", "boxes"  # names of a detector's outputs


@dataclass(frozen=True)
class Boxes:
    """How the outputs of a detector become boxes (deploy/measure/boxes.py). K: candidates of an image, all levels together.

    Outputs are `scores` (B, K, classes) in front of their activation and `boxes` (B, K, 4), perhaps among others. `form`
    tells what the latter are:

    - "corners": left, top, right, bottom in pixels of the network's image;
    - "centers": centre x, centre y, width, height, divided by the image's width and height (DETR);
    - "deltas": offsets and logarithms of sizes relative to anchors, as Faster R-CNN and RetinaNet predict them. `strides` of
      the levels in pixels, `sizes` of the anchors on each level, `ratios` of height to width;
    - "bins": for every stride `scores_<stride>` (B, classes, h, w) and `boxes_<stride>` (B, 4 `bins`, h, w): logits of the
      distances to left, top, right and bottom in units of the stride (Li et al., Generalized Focal Loss, 2020).

    `image`: height and width of what the network reads in pixels; for a network of images these are those of INPUT=.
    `activation`: "sigmoid", or "softmax" over classes among which `background` (its index) means no object. `nms`: boxes
    of one class that overlap a better one by this intersection over union are dropped; None: none are, as for networks
    whose queries do not repeat each other.
    """

    form: str
    image: tuple[int, int]
    classes: int
    activation: str = SIGMOID
    background: int | None = None
    nms: float | None = 0.6
    strides: tuple[int, ...] = ()
    sizes: tuple[tuple[float, ...], ...] = ()
    ratios: tuple[float, ...] = ()
    bins: int = 0

    def grid(self, stride: int) -> tuple[int, int]:
        """Height and width of the level of `stride`: a network rounds up where the image is no multiple."""
        return -(-self.image[0] // stride), -(-self.image[1] // stride)

    def shapes(self) -> dict[str, tuple[int | None, ...]]:
        """The shape of every output without the batch axis; None where any number will do."""
        if self.form == BINS:
            grids = {stride: self.grid(stride) for stride in self.strides}
            found: dict[str, tuple[int | None, ...]] = {}
            for stride, grid in grids.items():
                found[f"{SCORES}_{stride}"] = (self.classes, *grid)
                found[f"{PLACES}_{stride}"] = (4 * self.bins, *grid)
            return found
        count = None
        if self.form == DELTAS:
            cells = (h * w for h, w in map(self.grid, self.strides))
            count = sum(n * len(sizes) * len(self.ratios) for n, sizes in zip(cells, self.sizes, strict=True))
        return {SCORES: (count, self.classes), PLACES: (count, 4)}

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the manifest."""
        return asdict(self)


@dataclass(frozen=True)
class Task:
    """The name of the task (a file of deploy/measure/tasks), and for a detector how its outputs become boxes."""

    name: str
    boxes: Boxes | None = None


def _tuples(value: Any) -> Any:
    return tuple(_tuples(each) for each in value) if isinstance(value, list | tuple) else value


def _numbers(values: Any, count: int | None = None) -> bool:
    """Whether these are positive numbers, `count` of them if it is given."""
    sound = isinstance(values, tuple) and all(isinstance(n, int | float) and n > 0 for n in values)
    return sound and bool(values) and (count is None or len(values) == count)


def _fault(said: Boxes) -> str | None:
    """What is wrong with a description, or None."""
    whole = (*said.image, *said.strides) if isinstance(said.image, tuple) and isinstance(said.strides, tuple) else ("",)
    faults = (
        (said.form not in FORMS, f"form {said.form!r} is none of {', '.join(FORMS)}"),
        (not _numbers(said.image, 2), f"image {said.image!r} is not height and width in pixels"),
        (not all(isinstance(n, int) for n in whole), "image and strides are not whole numbers"),
        (not isinstance(said.classes, int) or said.classes < 1, f"classes {said.classes!r} is not a number of classes"),
        (said.activation not in (SIGMOID, SOFTMAX), f"activation {said.activation!r} is neither {SIGMOID} nor {SOFTMAX}"),
        (
            (said.activation == SOFTMAX) != (said.background in range(-1, said.classes))
            if isinstance(said.classes, int) else False,
            f"background {said.background!r}: {SOFTMAX} needs the index of the class that means no object, {SIGMOID} None",
        ),
        (
            said.nms is not None and not (isinstance(said.nms, int | float) and 0 < said.nms <= 1),
            f"nms {said.nms!r} is neither None nor an intersection over union in 0..1",
        ),
        (said.form in (DELTAS, BINS) and not _numbers(said.strides), f"form {said.form!r} needs strides in pixels"),
        (said.form == BINS and not (isinstance(said.bins, int) and said.bins > 1), "form 'bins' needs a number of bins"),
        (said.form == DELTAS and not _numbers(said.ratios), "form 'deltas' needs ratios of height to width"),
        (
            said.form == DELTAS
            and not (
                isinstance(said.sizes, tuple) and isinstance(said.strides, tuple)
                and len(said.sizes) == len(said.strides) and all(map(_numbers, said.sizes))
            ),
            "form 'deltas' needs the sizes of the anchors of every stride",
        ),
    )  # fmt: skip
    return next((what for wrong, what in faults if wrong), None)


def boxes_of(described: Any, outputs: Mapping[str, tuple[int, ...]], kind: str) -> Boxes:
    """Return what a network of the class `kind` says of its boxes, compared with the shapes of its `outputs`.

    `described`: a mapping of the fields of `Boxes`. Raises UserError if it is none, or does not fit the outputs.
    """
    names = Boxes.__dataclass_fields__
    if not isinstance(described, Mapping):
        raise UserError(f"{kind} says boxes = {described!r}: {EXPECTED}")
    if unknown := [name for name in described if name not in names]:
        raise UserError(f"{kind} says boxes with '{unknown[0]}': {EXPECTED}.{suggestion(str(unknown[0]), names)}")
    if missing := [name for name in ("form", "image", "classes") if name not in described]:
        raise UserError(f"{kind} says boxes without '{missing[0]}': {EXPECTED}")
    said = Boxes(**{name: _tuples(value) for name, value in described.items()})
    if fault := _fault(said):
        raise UserError(f"{kind} says boxes, but {fault}: {EXPECTED}")
    expected = said.shapes()
    fits = outputs.keys() >= expected.keys() and all(
        len(shape) == len(outputs[name]) and all(n in (None, m) for n, m in zip(shape, outputs[name], strict=True))
        for name, shape in expected.items()
    )
    if not fits or (said.form != BINS and outputs[SCORES][0] != outputs[PLACES][0]):
        shown = ", ".join(
            f"{name} ({', '.join('K' if n is None else str(n) for n in shape)})" for name, shape in expected.items()
        )
        found = ", ".join(f"{name} {shape}" for name, shape in outputs.items())
        raise UserError(
            f"{kind} says boxes of the form '{said.form}', for which its outputs should be {shown}: they are {found}"
        )
    return said
