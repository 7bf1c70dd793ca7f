"""The built-in sample images: random crops of colour photographs inside the scikit-image and scikit-learn wheels.

They are enough to try the tool without a data set, not enough to ship an engine. Calibration and evaluation share no
source image, and both have natural scenes. The files are read from the package folders, not downloaded.
"""

import functools
import hashlib
import importlib.util
import math
from pathlib import Path

import numpy as np
from PIL import Image

from calib.errors import UserError
from calib.images.picture import Picture
from calib.images.preprocess import RESAMPLING, Preprocessing, normalised, rgb_image

# (package, file). The right motorcycle image is left out, because it shows the same scene as the left one.
CALIBRATION_PHOTOS = (
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/coffee.png"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("skimage", "data/rocket.jpg"),
    ("skimage", "data/ihc.png"),  # stained tissue
    ("skimage", "data/hubble_deep_field.jpg"),
)
EVALUATION_PHOTOS = (
    ("skimage", "data/chelsea.png"),  # a cat
    ("sklearn", "datasets/images/china.jpg"),  # a temple
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/retina.jpg"),
)

AREA = (0.3, 1.0)  # area of a crop as a share of the source image
ASPECT = (3 / 4, 4 / 3)  # width over height of a crop
DRAWS = 10  # attempts to fit a window into the source image before the whole image is taken


def _path(package: str, name: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the built-in sample images were expected in the package '{package}', which is not installed: "
            f"run `pip install -r requirements.txt` or name a calibration folder"
        )
    return Path(spec.submodule_search_locations[0]) / name


@functools.cache  # ten source images, 15 MB decoded, cropped hundreds of times
def _photo(path: Path) -> tuple[str, Image.Image]:
    """(hex sha256 of the file, the decoded RGB image)."""
    if not path.is_file():
        raise UserError(
            f"sample image '{path}' is missing: expected it in the installed package; "
            f"run `pip install -r requirements.txt` or name a calibration folder"
        )
    with Image.open(path) as image:
        return hashlib.sha256(path.read_bytes()).hexdigest(), rgb_image(image)


def random_window(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A random window (left, top, right, bottom) in pixels inside width x height, with area in AREA, aspect in ASPECT."""
    for _ in range(DRAWS):
        area = rng.uniform(*AREA) * width * height
        aspect = math.exp(rng.uniform(*np.log(ASPECT)))
        across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if across <= width and down <= height:
            left, top = int(rng.integers(width - across + 1)), int(rng.integers(height - down + 1))
            return left, top, left + across, top + down
    return 0, 0, width, height


def _read_crop(path: Path, window: tuple[int, int, int, int], flip: bool, preprocessing: Preprocessing) -> np.ndarray:
    image = _photo(path)[1].crop(window)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    size = (preprocessing.width, preprocessing.height)
    return normalised(image.resize(size, RESAMPLING[preprocessing.interpolation]), preprocessing)


def random_crops(photos: tuple[tuple[str, str], ...], count: int, seed: int) -> tuple[Picture, ...]:
    """`count` random crops, randomly flipped, of the source images `photos` in turn.

    With the same seed, a smaller `count` gives the first crops of a larger one. Raises `UserError` if a package or
    source image is missing.
    """
    rng = np.random.default_rng(seed)
    pictures = []
    for index in range(count):
        package, name = photos[index % len(photos)]
        path = _path(package, name)
        content, photo = _photo(path)
        window, flip = random_window(*photo.size, rng), bool(rng.integers(2))
        read = functools.partial(_read_crop, path, window, flip)
        pictures.append(Picture(path.name, content, read, f"{window}{' flipped' if flip else ''}"))
    return tuple(pictures)
