"""COCO's annotations as boxes in the image that a network reads."""

import json

import numpy as np
import pytest
from PIL import Image

from calib.errors import UserError
from calib.images.annotations import annotations_of, boxes_from_coco
from calib.images.preprocess import array_from_image, placed, preprocessing_from_config

CONFIG = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "bilinear", "crop_pct": 1.0}


def reading(height, width, mode, crop_pct=1.0):
    return preprocessing_from_config(
        CONFIG | {"input_size": (3, height, width), "crop_mode": mode, "crop_pct": crop_pct}
    )


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.8])
@pytest.mark.parametrize("size", [(96, 64), (64, 96), (160, 80)])
def test_a_box_is_where_its_pixels_are(mode, crop_pct, size):
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    left, top, right, bottom = 24, 20, 56, 44
    pixels[top:bottom, left:right] = 255
    preprocessing = reading(64, 64, mode, crop_pct)
    bright = array_from_image(Image.fromarray(pixels), preprocessing)[0] > 0.5
    rows, columns = np.nonzero(bright.any(1))[0], np.nonzero(bright.any(0))[0]
    seen = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert placed(np.array([[left, top, right, bottom]]), size, preprocessing)[0] == pytest.approx(seen, abs=1.1)


def written(path, **changes):
    content = {
        "images": [
            {"id": 7, "file_name": "a.jpg", "width": 100, "height": 50},
            {"id": 3, "file_name": "b.jpg", "width": 50, "height": 50},
        ],
        "annotations": [
            {"image_id": 7, "category_id": 18, "bbox": [10, 10, 20, 30]},
            {"image_id": 7, "category_id": 1, "bbox": [0, 0, 100, 50], "iscrowd": 1},
            {"image_id": 9, "category_id": 1, "bbox": [0, 0, 1, 1]},
        ],
        "categories": [{"id": 18}, {"id": 1}],
    }  # fmt: skip
    path.write_text(json.dumps(content | changes))
    return path


def test_boxes_of_the_images_in_their_order(tmp_path):
    b, a = boxes_from_coco(written(tmp_path / "x.json"), ["b.jpg", "a.jpg"], reading(100, 100, "squash"), 2)
    assert b.shape == (0, 6)
    assert a.tolist() == [[10, 20, 30, 80, 1, 0], [0, 0, 100, 100, 0, 1]]


def test_boxes_that_the_crop_takes_whole_are_no_longer_there(tmp_path):
    far = [{"image_id": 7, "category_id": 1, "bbox": [0, 0, 20, 50]}]
    (a,) = boxes_from_coco(written(tmp_path / "x.json", annotations=far), ["a.jpg"], reading(50, 50, "center"), 2)
    assert a.shape == (0, 6)


@pytest.mark.parametrize(
    ("classes", "background", "of_dog"), [(2, None, 1), (3, -1, 1), (3, 0, 2), (91, None, 18), (91, 0, 18)]
)
def test_categories_are_classes_by_their_order_or_by_their_ids(tmp_path, classes, background, of_dog):
    path = written(tmp_path / "x.json")
    (a,) = boxes_from_coco(path, ["a.jpg"], reading(50, 50, "squash"), classes, background)
    assert a[0, 4] == of_dog


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"images": []}, "does not know the image 'a.jpg'"),
        ({"categories": None}, "holds no annotations of boxes"),
        ({"annotations": [{"image_id": 7, "category_id": 18}]}, "an entry without 'bbox'"),
        ({"annotations": [{"image_id": 7, "category_id": 18, "bbox": [1, 2]}]}, "one of another form"),
        ({"categories": [{"id": 18}, {"id": 1}, {"id": 2}]}, "3 categories with ids to 18, the network 2 classes"),
    ],
)
def test_a_file_of_another_form_is_one_line(tmp_path, changes, wrong):
    with pytest.raises(UserError, match=wrong):
        boxes_from_coco(written(tmp_path / "x.json", **changes), ["a.jpg"], reading(50, 50, "squash"), 2)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        boxes_from_coco(tmp_path / "broken.json", [], reading(50, 50, "squash"), 2)


def test_the_file_lies_among_the_images_or_where_coco_has_it(tmp_path):
    folder = tmp_path / "val2017"
    folder.mkdir()
    assert annotations_of(folder) is None
    assert annotations_of(tmp_path / "images.npy") is None
    (tmp_path / "annotations").mkdir()
    beside = written(tmp_path / "annotations/instances_val2017.json")
    assert annotations_of(folder) == beside
    inside = written(folder / "boxes.json")
    assert annotations_of(folder) == inside
    written(folder / "other.json")
    with pytest.raises(UserError, match=r"2 .json files \(boxes.json, other.json\)"):
        annotations_of(folder)
