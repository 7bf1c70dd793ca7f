"""Oracle: timm's own evaluation transform, and torchvision's ToTensor for pixel values."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from calib.errors import UserError
from calib.images.preprocess import Preprocessing, array_from_image, preprocessing_from_config, rgb_image
from calib.images.sample_photos import CALIBRATION_PHOTOS, EVALUATION_PHOTOS, _path

CONFIG = {
    "input_size": (3, 224, 224),
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 0.9,
    "crop_mode": "center",
}
ROOT = Path(__file__).parents[4]
PHOTOS = [_path(*photo) for photo in CALIBRATION_PHOTOS[:3] + EVALUATION_PHOTOS[:2]]


def timm_array(image, config):
    from timm.data import create_transform

    return create_transform(**config, is_training=False)(image).numpy()


def plain(size=8):
    """No resizing and no normalising, so that pixel values can be read off."""
    return Preprocessing(size, size, size, size, "bilinear", (0, 0, 0), (1, 1, 1))


def reopened(image, kind, **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return Image.open(io.BytesIO(data.getvalue()))


def gradient(shape=(8, 8), dtype=np.uint8, top=255):
    return np.linspace(0, top, int(np.prod(shape))).round().reshape(shape).astype(dtype)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"interpolation": "bilinear", "crop_pct": 0.875},
        {"crop_pct": 1.0, "crop_mode": "squash"},
        {"crop_pct": 1.0, "crop_mode": "border"},
        {"crop_pct": 0.9, "crop_mode": "border", "input_size": (3, 192, 256)},
        {"crop_pct": 0.9, "crop_mode": "squash", "input_size": (3, 192, 256)},
        {"input_size": (3, 240, 320), "crop_pct": 0.95},
        {"input_size": (3, 113, 113), "crop_pct": 1.15},
        {"interpolation": "lanczos", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    ],
)
def test_photographs_come_out_as_from_timm_bit_for_bit(change):
    config = CONFIG | change
    preprocessing = preprocessing_from_config(config)
    for path in PHOTOS:
        with Image.open(path) as image:
            np.testing.assert_array_equal(array_from_image(image, preprocessing), timm_array(image, config))


def test_config_of_a_real_model_comes_out_as_from_timm():
    import timm

    config = timm.data.resolve_model_data_config(timm.create_model("mobilenetv3_small_050", pretrained=False))
    with Image.open(PHOTOS[0]) as image:
        ours = array_from_image(image, preprocessing_from_config(config))
        np.testing.assert_array_equal(ours, timm_array(image, config))


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    side=st.tuples(st.integers(5, 40), st.integers(5, 40)),
    crop_pct=st.sampled_from([0.8, 0.875, 0.95, 1.0, 1.1]),
    crop_mode=st.sampled_from(["center", "squash", "border"]),
)
def test_any_size_comes_out_as_from_timm(width, height, side, crop_pct, crop_mode):
    if max(width, height) > 32 * min(width, height):
        return  # strips lose their ends on purpose
    config = CONFIG | {"input_size": (3, *side), "crop_pct": crop_pct, "crop_mode": crop_mode}
    pixels = np.random.default_rng(width * 100 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    ours = array_from_image(image, preprocessing_from_config(config))
    assert ours.shape == (3, *side)
    try:
        theirs = timm_array(image, config)
    except ValueError:  # of Pillow: timm rounds the thin side of a strip to 0
        assert crop_mode == "border"
        assert max(width, height) > min(side) * min(width, height)
        return
    np.testing.assert_array_equal(ours, theirs)


def test_the_thin_side_of_a_strip_keeps_one_pixel():
    config = CONFIG | {"input_size": (3, 5, 5), "crop_mode": "border", "mean": (0.0,) * 3, "std": (1.0,) * 3}
    white = Image.new("RGB", (1, 20), (255, 255, 255))
    found = array_from_image(white, preprocessing_from_config(config))
    assert (found == 1).sum() == 3 * 5


@pytest.mark.parametrize("size", [(3000, 2), (2, 3000)])
def test_a_strip_is_cut_to_its_middle_and_stays_close_to_timm(size):
    config = CONFIG | {"input_size": (3, 32, 32)}
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    ours = array_from_image(image, preprocessing_from_config(config))
    # Half a source pixel of shift on a gradient of 256 levels over 3000 pixels: under one level, 1/255/0.224.
    np.testing.assert_allclose(ours, timm_array(image, config), atol=1.01 / 255 / 0.224)


def test_a_long_strip_is_never_resized_whole(monkeypatch):
    sizes = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda *args: sizes.append(args[1]) or resize(*args))
    array = array_from_image(Image.new("RGB", (20000, 1), "white"), preprocessing_from_config(CONFIG))
    assert array.shape == (3, 224, 224)
    assert sizes == [(32 * 248, 248)]


def test_an_image_of_one_pixel_becomes_a_flat_image():
    array = array_from_image(Image.new("RGB", (1, 1), (255, 0, 51)), plain(4))
    np.testing.assert_array_equal(array, np.float32([1, 0, 0.2])[:, None, None] * np.ones((3, 4, 4), "float32"))
    assert array.dtype == np.float32
    assert array.flags.c_contiguous


def test_grey_becomes_three_equal_channels():
    grey = gradient()
    expected = np.repeat(grey[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(rgb_image(Image.fromarray(grey)), expected)
    with_alpha = np.stack([grey, 255 - grey], axis=2)
    np.testing.assert_array_equal(rgb_image(Image.fromarray(with_alpha)), expected)


def test_alpha_is_dropped_as_in_timm_datasets():
    pixels = gradient((8, 8, 4))
    np.testing.assert_array_equal(rgb_image(Image.fromarray(pixels)), pixels[:, :, :3])


def test_palette_images_give_their_colours(recwarn):
    colours = np.array([[[250, 10, 20], [0, 0, 255]]], dtype=np.uint8)
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8)).convert("P")
    image.putpalette(colours.reshape(-1).tolist())
    for options in ({}, {"transparency": b"\x00\x80"}):
        palette = reopened(image, "PNG", **options)
        assert palette.mode == "P"
        np.testing.assert_array_equal(rgb_image(palette), colours)
    assert not recwarn.list


def test_one_bit_images_become_black_and_white():
    bits = np.array([[True, False, True]])
    image = reopened(Image.fromarray(bits), "PNG")
    assert image.mode == "1"
    np.testing.assert_array_equal(np.asarray(rgb_image(image))[:, :, 0], [[255, 0, 255]])


def test_cmyk_jpegs_show_the_right_colour():
    image = reopened(Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK"), "JPEG", quality=95)
    assert image.mode == "CMYK"
    # JPEG at quality 95 moves a flat colour by a few levels; inverted inks would move it by over 100.
    np.testing.assert_allclose(np.asarray(rgb_image(image))[8, 8], (200, 40, 90), atol=4)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_divided_by_257_not_clipped(kind):
    values = gradient(dtype=np.uint16, top=65535)
    image = reopened(Image.fromarray(values), kind)
    assert image.mode == "I;16"
    expected = np.rint(values / 257).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(rgb_image(image))[:, :, 1], expected)


def test_mode_i_holds_sixteen_bit_values_and_is_clipped_beyond():
    image = Image.fromarray(np.array([[-5, 0, 25700, 65535, 70000]], dtype=np.int32))
    assert image.mode == "I"
    np.testing.assert_array_equal(np.asarray(rgb_image(image))[0, :, 0], [0, 0, 100, 255, 255])


@pytest.mark.parametrize(("values", "expected"), [([0, 0.2, 1], [0, 51, 255]), ([0, 51, 300], [0, 51, 255])])
def test_float_images_of_either_range_become_eight_bit(values, expected):
    image = Image.fromarray(np.array([[*values, np.nan]], dtype=np.float32))
    np.testing.assert_array_equal(np.asarray(rgb_image(image))[0, :, 2], [*expected, 0])


def test_a_rotated_jpeg_is_turned_upright_once():
    pixels = np.zeros((32, 64, 3), dtype=np.uint8)
    pixels[:, :32] = 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view: the left edge becomes the top
    image = reopened(Image.fromarray(pixels), "JPEG", exif=exif, quality=100)
    upright = rgb_image(image)
    assert upright.size == (32, 64)
    assert np.asarray(upright)[:28].min() > 250
    assert np.asarray(upright)[36:].max() < 5
    np.testing.assert_array_equal(rgb_image(upright), upright)
    assert image.size == (64, 32)  # the caller's image is as it was


def test_preprocessing_survives_json():
    squash = preprocessing_from_config(CONFIG | {"crop_mode": "squash", "input_size": (3, 192, 256)})
    assert (squash.height, squash.width, squash.resize_height, squash.resize_width) == (192, 256, 213, 284)
    loaded = json.loads(json.dumps(squash.to_json()))
    assert loaded == squash.to_json()
    assert Preprocessing.from_json(loaded) == squash


def test_a_config_without_crop_settings_uses_timm_defaults():
    config = {key: value for key, value in CONFIG.items() if not key.startswith("crop")}
    with Image.open(PHOTOS[1]) as image:
        ours = array_from_image(image, preprocessing_from_config(config))
        np.testing.assert_array_equal(ours, timm_array(image, config))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"crop_mode": "fill"}, ["crop_mode 'fill'", "center, squash, border"]),
        ({"interpolation": "bicubik"}, ["interpolation 'bicubik'", "Did you mean 'bicubic'"]),
        ({"interpolation": "random"}, ["interpolation 'random'", "bilinear"]),
        ({"input_size": (1, 28, 28)}, ["1 input channels", "expected 3"]),
    ],
)
def test_unsupported_configs_are_refused_by_name(change, named):
    with pytest.raises(UserError) as caught:
        preprocessing_from_config(CONFIG | change)
    assert all(text in str(caught.value) for text in named)
    assert "\n" not in str(caught.value)


def test_a_manifest_with_a_wrong_field_is_refused_by_name():
    values = plain().to_json()
    del values["resize_width"]
    with pytest.raises(UserError, match=r"unknown fields resize_width, sharpen: expected exactly"):
        Preprocessing.from_json(values | {"sharpen": 1})
    with pytest.raises(UserError, match="crop_mode 'fill'"):
        Preprocessing.from_json(plain().to_json() | {"crop_mode": "fill"})


@pytest.mark.parametrize("module", ["calib.images.preprocess", "calib.images.image_set"])
def test_importing_needs_no_heavy_package(module):
    heavy = {"torch", "timm", "torchvision", "skimage", "sklearn"}
    code = f"import sys, {module}; print({heavy} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_eight_bit_values_in_a_wider_grey_file_keep_their_brightness(dtype):
    values = gradient(dtype=dtype, top=255)
    image = reopened(Image.fromarray(values), "PNG" if dtype == np.uint16 else "TIFF")
    assert image.mode in ("I;16", "I")
    np.testing.assert_array_equal(np.asarray(rgb_image(image))[:, :, 1], values)
