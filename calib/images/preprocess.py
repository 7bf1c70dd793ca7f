"""Preprocessing: an image -> the array that a timm network expects, with Pillow and numpy only.

The steps and roundings are those of timm's evaluation transform: RGB, resize, centre crop, scale to 0..1, normalise.
A serving machine runs this file without torch.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from calib.errors import UserError, suggestion

RESAMPLING = {filter.name.lower(): filter for filter in Image.Resampling}
CROP_MODES = ("center", "squash", "border")
DEFAULT_CROP_PCT = 0.875  # timm's, for a config that names none

# A strip of 1 x 20000 pixels would take gigabytes if it were resized whole; only its middle is in the crop.
LONGEST_ASPECT = 32


@dataclass(frozen=True)
class Preprocessing:
    """The parameters of the preprocessing of an image."""

    height: int  # pixels the network takes
    width: int
    resize_height: int  # pixels before the centre crop: floor(height / crop_pct)
    resize_width: int
    interpolation: str  # a Pillow filter: "bicubic", "bilinear", ...
    mean: tuple[float, float, float]  # per RGB channel, of pixels scaled to 0..1
    std: tuple[float, float, float]
    # "center" keeps the aspect ratio, "squash" resizes each edge on its own, "border" keeps the ratio and the whole image:
    # what it leaves free has the colour of the mean
    crop_mode: str = "center"

    def to_json(self) -> dict[str, Any]:
        """The fields as values that `json.dumps` accepts."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Preprocessing":
        """The inverse of `to_json`. Raises `UserError` for a missing or unknown field or value."""
        expected = {field.name for field in fields(Preprocessing)}
        if wrong := sorted(expected ^ set(values)):
            raise UserError(
                f"preprocessing has missing or unknown fields {', '.join(wrong)}: expected exactly "
                f"{', '.join(sorted(expected))}; export the package again"
            )
        _checked("interpolation", values["interpolation"], RESAMPLING)
        _checked("crop_mode", values["crop_mode"], CROP_MODES)
        return Preprocessing(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


def _checked(name: str, value: str, known: Any) -> str:
    if value not in known:
        raise UserError(
            f"preprocessing {name} '{value}' is not supported: expected one of {', '.join(known)}; "
            f"change the model's data config.{suggestion(str(value), known)}"
        )
    return value


def preprocessing_from_config(config: Mapping[str, Any]) -> Preprocessing:
    """The preprocessing that `timm.data.create_transform(**config, is_training=False)` would do.

    `config` is the result of `timm.data.resolve_model_data_config(net)`. Raises `UserError` for a network
    that does not take 3 channels, an unknown interpolation, or an unknown crop mode.
    """
    channels, height, width = config["input_size"]
    if channels != 3:
        raise UserError(
            f"the model takes {channels} input channels: expected 3 (RGB); choose a model trained on RGB images"
        )
    crop_pct = config.get("crop_pct") or DEFAULT_CROP_PCT
    red, green, blue = map(float, config["mean"])
    red_std, green_std, blue_std = map(float, config["std"])
    return Preprocessing(
        height=height,
        width=width,
        resize_height=math.floor(height / crop_pct),
        resize_width=math.floor(width / crop_pct),
        interpolation=_checked("interpolation", config["interpolation"], RESAMPLING),
        mean=(red, green, blue),
        std=(red_std, green_std, blue_std),
        crop_mode=_checked("crop_mode", config.get("crop_mode") or "center", CROP_MODES),
    )


def _eight_bit(image: Image.Image) -> Image.Image:
    """The image in 8 bits. Modes "I" and "I;16" hold 0..65535 or 0..255, "F" 0..1 or 0..255; Pillow's own clips at 255.

    No value above 255 in 16 bits would be a black picture: these are 8 bits in a wider file, as numpy and scanners write.
    """
    values = np.asarray(image)
    if image.mode == "F":
        values = np.nan_to_num(values)
        values = values * 255 if values.max() <= 1 else values
        return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
    values = np.clip(values, 0, 65535).astype(np.int32)
    return Image.fromarray((values if values.max() <= 255 else (values + 128) // 257).astype(np.uint8))


def rgb_image(image: Image.Image) -> Image.Image:
    """`image` upright (EXIF orientation applied) as 8-bit RGB, from any mode; `image` is not changed.

    Alpha is dropped, as in timm's datasets; 16-bit grey is divided by 257 unless no value is above 255. Raises
    what Pillow raises for damaged pixels.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bit(image)
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB gives the same colours, and a warning
    return image.convert("RGB")


def _resized_size(width: int, height: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """(width, height) before the crop, with the roundings of timm's four cases."""
    target_width, target_height = preprocessing.resize_width, preprocessing.resize_height
    if preprocessing.crop_mode == "squash":
        return target_width, target_height
    if preprocessing.crop_mode == "border":
        # timm's ResizeKeepRatio by the longer edge, which fails where the other one rounds to 0
        ratio = max(height / target_height, width / target_width)
        return max(round(width / ratio), 1), max(round(height / ratio), 1)
    if target_width == target_height:  # torchvision's Resize: the shorter edge, longer one rounded down
        short, long = sorted((width, height))
        longer = int(target_width * long / short)
        return (target_width, longer) if width <= height else (longer, target_width)
    ratio = min(height / target_height, width / target_width)  # timm's ResizeKeepRatio
    return round(width / ratio), round(height / ratio)


def _crop_start(size: int, crop: int) -> int:
    """The first pixel of a centre crop. It is negative if the crop is larger: black is filled in, as in torchvision."""
    return round((size - crop) / 2) if size >= crop else -((crop - size) // 2)


def _without_long_sides(image: Image.Image) -> Image.Image:
    """The middle of an image that is longer than LONGEST_ASPECT : 1, else the image."""
    width, height = image.size
    longest = LONGEST_ASPECT * min(width, height)
    if max(width, height) <= longest:
        return image
    kept_width, kept_height = min(width, longest), min(height, longest)
    left, top = (width - kept_width) // 2, (height - kept_height) // 2
    return image.crop((left, top, left + kept_width, top + kept_height))


def placed(boxes: np.ndarray, size: tuple[float, float], preprocessing: Preprocessing) -> np.ndarray:
    """`boxes` (K, 4), left, top, right, bottom in pixels of an image of `size` (width, height), in the preprocessed image.

    They are cut at its border. The image is not longer than LONGEST_ASPECT, and upright.
    """
    width, height = _resized_size(int(size[0]), int(size[1]), preprocessing)
    left, top = _crop_start(width, preprocessing.width), _crop_start(height, preprocessing.height)
    scale = np.array([width / size[0], height / size[1]] * 2)
    moved = boxes * scale - np.array([left, top] * 2)
    return np.clip(moved, 0, [preprocessing.width, preprocessing.height] * 2)


def normalised(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """The pixels of an RGB image as float32 (3, H, W), (pixel / 255 - mean) / std per channel; no resizing."""
    pixels = np.asarray(image, dtype=np.float32) / np.float32(255)
    mean = np.asarray(preprocessing.mean, dtype=np.float32)
    std = np.asarray(preprocessing.std, dtype=np.float32)
    return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))


def array_from_image(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """The preprocessed array, float32 (3, height, width), of a Pillow image of any mode and size.

    It equals timm's evaluation transform of an upright RGB image, except that images longer than 32:1 are first
    cropped to their middle. Raises what Pillow raises for damaged pixels.
    """
    image = rgb_image(image)
    if preprocessing.crop_mode == "center":
        image = _without_long_sides(image)
    image = image.resize(_resized_size(*image.size, preprocessing), RESAMPLING[preprocessing.interpolation])
    left = _crop_start(image.width, preprocessing.width)
    top = _crop_start(image.height, preprocessing.height)
    if preprocessing.crop_mode == "border":
        red, green, blue = (round(255 * each) for each in preprocessing.mean)
        whole = Image.new("RGB", (preprocessing.width, preprocessing.height), (red, green, blue))
        whole.paste(image, (-left, -top))
        return normalised(whole, preprocessing)
    image = image.crop((left, top, left + preprocessing.width, top + preprocessing.height))
    return normalised(image, preprocessing)
