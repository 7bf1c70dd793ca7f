"""Promises of the image sets: disjoint, deterministic, re-iterable, small in memory, clear on bad input."""

import hashlib
import itertools
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from calib.errors import UserError
from calib.images.folder import labels_from_names, listed
from calib.images.image_set import ImageSet, image_sets
from calib.images.picture import Picture
from calib.images.preprocess import Preprocessing, array_from_image
from calib.images.sample_photos import CALIBRATION_PHOTOS, EVALUATION_PHOTOS, _path, random_window

SMALL = Preprocessing(16, 16, 18, 18, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def picture(value, size=(24, 20)):
    return Image.fromarray(np.random.default_rng(value).integers(0, 256, (*size, 3), dtype=np.uint8))


def save(folder, name, value):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(value).save(path)
    return path


@pytest.fixture
def photos(tmp_path):
    """24 distinct readable images, some in subfolders and of odd extensions."""
    folder = tmp_path / "photos"
    for value in range(24):
        save(
            folder,
            f"{['.', 'deep/er', 'other'][value % 3]}/{value}.{['png', 'JPEG', 'webp'][value % 3]}",
            value,
        )
    return folder


def stream(images, batch_size=8):
    return np.concatenate(list(images.batches(batch_size)))


def names(images):
    return [each.name for each in images.pictures]


def contents(images):
    return {each.content for each in images.pictures}


def refusal(*args, **options):
    with pytest.raises(UserError) as caught:
        image_sets(*args, SMALL, **options)
    assert "\n" not in str(caught.value)
    assert "expected" in str(caught.value)
    return str(caught.value)


# Folders


def test_a_batch_holds_the_preprocessed_files_in_the_order_of_the_pictures(photos):
    calibration, _ = image_sets(str(photos), None, SMALL, count=10, eval_count=4)
    expected = [array_from_image(Image.open(photos / name), SMALL) for name in names(calibration)]
    np.testing.assert_array_equal(stream(calibration), expected)
    assert stream(calibration).dtype == np.float32
    assert calibration.count == 10
    assert not calibration.sample
    assert calibration.labels is None


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_stream_does_not_depend_on_the_batch_size_and_can_be_read_again(photos, batch_size):
    calibration, _ = image_sets(str(photos), None, SMALL, count=15)
    sizes = [len(batch) for batch in calibration.batches(batch_size)]
    assert sizes == [min(batch_size, 15 - start) for start in range(0, 15, batch_size)]
    first = stream(calibration, batch_size)
    np.testing.assert_array_equal(first, stream(calibration, batch_size))
    np.testing.assert_array_equal(first, stream(calibration, 4))


def test_the_seed_decides_the_choice(photos):
    chosen = {seed: image_sets(str(photos), None, SMALL, count=8, eval_count=4, seed=seed) for seed in (0, 1)}
    again = image_sets(str(photos), None, SMALL, count=8, eval_count=4, seed=0)
    assert [names(each) for each in again] == [names(each) for each in chosen[0]]
    assert [each.sha256 for each in again] == [each.sha256 for each in chosen[0]]
    assert contents(chosen[0][0]) != contents(chosen[1][0])
    assert chosen[0][0].sha256 != chosen[1][0].sha256


def test_the_choice_does_not_depend_on_the_order_the_disk_lists_files(photos, monkeypatch):
    before, _ = image_sets(str(photos), None, SMALL, count=8)
    listed = list(photos.rglob("*"))
    for order in (listed[::-1], sorted(listed, key=lambda path: path.name)):
        monkeypatch.setattr(Path, "rglob", lambda *_, order=order: iter(order))
        assert image_sets(str(photos), None, SMALL, count=8)[0].sha256 == before.sha256


@pytest.mark.parametrize(
    ("count", "eval_count", "expected"),
    [
        (8, 4, (8, 4)),
        (20, 4, (20, 4)),  # exactly enough
        (22, 8, (21, 3)),  # short: one in eight is held out
        (512, 2, (22, 2)),  # short: one in eight, at most eval_count
        (18, 128, (18, 6)),  # enough to calibrate: the rest is held out
        (1, 1, (1, 1)),
    ],
)
def test_calibration_and_held_out_images_share_the_folder(photos, count, eval_count, expected):
    calibration, evaluation = image_sets(str(photos), None, SMALL, count=count, eval_count=eval_count)
    assert (calibration.count, evaluation.count) == expected
    assert not contents(calibration) & contents(evaluation)


def test_two_images_are_enough_for_one_each(tmp_path):
    save(tmp_path, "a.png", 0)
    save(tmp_path, "b.png", 1)
    calibration, evaluation = image_sets(str(tmp_path), None, SMALL)
    assert (calibration.count, evaluation.count) == (1, 1)
    assert sorted(names(calibration) + names(evaluation)) == ["a.png", "b.png"]


def test_copies_of_a_photo_are_used_once(photos):
    for value in range(24):
        source = next(photos.rglob(f"{value}.*"))
        (photos / f"copy{value}{source.suffix}").write_bytes(source.read_bytes())
    calibration, evaluation = image_sets(str(photos), None, SMALL)
    digests = [hashlib.sha256((photos / name).read_bytes()).hexdigest() for name in names(calibration)]
    digests += [hashlib.sha256((photos / name).read_bytes()).hexdigest() for name in names(evaluation)]
    assert len(digests) == len(set(digests)) == 24


def test_unreadable_files_are_skipped_named_and_replaced(photos):
    for name in ("truncated.jpg", "truncated.tif"):
        picture(50, (100, 100)).save(photos / name)
        whole = (photos / name).read_bytes()
        (photos / name).write_bytes(whole[: len(whole) * 9 // 10])
    (photos / "text.png").write_text("not an image")
    (photos / "empty.gif").write_bytes(b"")
    (photos / "notes.txt").write_text("no image file at all")
    calibration, evaluation = image_sets(str(photos), None, SMALL, count=20, eval_count=4)
    assert (calibration.count, evaluation.count) == (20, 4)
    everything, _ = image_sets(str(photos), None, SMALL)
    assert set(everything.skipped) == {"truncated.jpg", "truncated.tif", "text.png", "empty.gif"}
    assert len(everything.skipped) == 4


def test_a_subset_is_a_slice_with_its_labels(tmp_path):
    for value in range(9):
        save(tmp_path, f"{value % 3}/{value}.png", value)
    _, evaluation = image_sets(None, str(tmp_path), SMALL, count=1)
    part = evaluation.subset(2, 5)
    np.testing.assert_array_equal(stream(part), stream(evaluation)[2:5])
    assert part.labels == evaluation.labels[2:5]
    assert evaluation.subset(7, 99).count == 2
    assert part.sha256 != evaluation.sha256


def test_the_digest_follows_content_order_and_preprocessing_but_not_place(photos, tmp_path):
    def digest(**options):
        return image_sets(str(photos), None, options.pop("preprocessing", SMALL), **options)[0].sha256

    before = digest(count=10)
    changed = replace(SMALL, interpolation="bicubic")
    others = [digest(count=10, preprocessing=changed), digest(count=9), digest(count=10, seed=3)]
    photos = photos.rename(tmp_path / "moved")
    assert digest(count=10) == before
    calibration, _ = image_sets(str(photos), None, SMALL, count=10)
    backwards = replace(calibration, pictures=calibration.pictures[::-1])
    picture(99).save(photos / names(calibration)[4])
    others += [digest(count=10), backwards.sha256]
    assert len({before, *others}) == 6


# Evaluation folders


def test_wnid_folders_give_imagenet_labels_for_any_subset_at_any_depth(tmp_path):
    # Imagenette's tench, English springer and parachute.
    known = {"n01440764": 0, "n02102040": 217, "n03888257": 701}
    for value, wnid in enumerate(known):
        save(tmp_path, f"val/{wnid}/{value}.png", value)
        save(tmp_path, f"train/{wnid}/{value}.png", 10 + value)
    for root in (tmp_path, tmp_path / "val"):
        _, evaluation = image_sets(None, str(root), SMALL, count=1)
        assert evaluation.count == len(list(root.rglob("*.png")))
        assert list(evaluation.labels) == [known[name.split("/")[-2]] for name in names(evaluation)]


@pytest.mark.parametrize(
    "classes",
    [{"7": 7, "010": 10, "2": 2}, {"cat": 0, "dog": 1, "eel": 2}, {"1": 0, "two": 2, "n01440764": 1}],
    ids=["integers", "names", "mixed"],
)
def test_other_folders_give_integers_or_sorted_places(tmp_path, classes):
    for value, name in enumerate(classes):
        save(tmp_path, f"{name}/x/{value}.png", value)
    _, evaluation = image_sets(None, str(tmp_path), SMALL, count=1)
    assert list(evaluation.labels) == [classes[name.split("/")[0]] for name in names(evaluation)]


def test_labels_stay_with_their_images_when_files_are_skipped(tmp_path):
    for value in range(12):
        save(tmp_path, f"{value % 4}/{value}.png", value)
    (tmp_path / "1" / "broken.png").write_text("broken")
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "broken.png").write_text("broken")
    _, evaluation = image_sets(None, str(tmp_path), SMALL, count=1)
    assert sorted(evaluation.skipped) == ["1/broken.png", "4/broken.png"]
    assert list(evaluation.labels) == [int(name.split("/")[0]) for name in names(evaluation)]


def test_a_folder_without_classes_has_no_labels(tmp_path):
    flat, single = tmp_path / "flat", tmp_path / "single"
    for value in range(3):
        save(flat, f"{value}.png", value)
        save(single, f"images/{value}.png", value)
    assert image_sets(None, str(flat), SMALL, count=1)[1].labels is None
    assert image_sets(None, str(single), SMALL, count=1)[1].labels is None


def test_an_evaluation_folder_is_used_whole_unless_a_number_is_given(tmp_path):
    for value in range(140):
        save(tmp_path, f"{value % 2}/{value}.png", value)
    assert image_sets(None, str(tmp_path), SMALL, count=1)[1].count == 140
    _, some = image_sets(None, str(tmp_path), SMALL, count=1, eval_count=20)
    assert some.count == 20
    assert set(some.labels) == {0, 1}  # chosen at random, not from the first folder


def test_evaluation_files_that_were_calibrated_on_are_left_out_and_counted(photos, tmp_path):
    calibration, _ = image_sets(str(photos), None, SMALL, count=10)
    other = tmp_path / "evaluation"
    other.mkdir()
    for place, name in enumerate(names(calibration)[:6]):
        (other / f"{place}{(photos / name).suffix}").write_bytes((photos / name).read_bytes())
    for value in range(3):
        save(other, f"new{value}.png", 100 + value)
    again, evaluation = image_sets(str(photos), str(other), SMALL, count=10)
    assert again.sha256 == calibration.sha256
    assert sorted(names(evaluation)) == ["new0.png", "new1.png", "new2.png"]
    assert (evaluation.overlap, again.overlap) == (6, 0)


def test_sample_photographs_are_left_out_of_an_evaluation_folder(tmp_path):
    save(tmp_path, "new.png", 0)
    (tmp_path / "coffee.png").write_bytes(_path("skimage", "data/coffee.png").read_bytes())
    _, evaluation = image_sets(None, str(tmp_path), SMALL, count=6)
    assert names(evaluation) == ["new.png"]
    assert evaluation.overlap == 1


def test_one_calibration_image_is_enough_with_an_evaluation_folder(photos, tmp_path):
    save(tmp_path / "one", "only.png", 77)
    calibration, evaluation = image_sets(str(tmp_path / "one"), str(photos / "other"), SMALL)
    assert (calibration.count, evaluation.count) == (1, 8)


# Arrays


def test_preprocessed_arrays_come_out_unchanged(tmp_path):
    array = np.random.default_rng(0).normal(size=(20, 3, 16, 16)).astype(np.float32)
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", array)
    np.savez_compressed(tmp_path / "b.npz", labels=np.arange(20), images=array)
    streams = []
    for name in ("a.npy", "a.npz", "b.npz"):
        calibration, evaluation = image_sets(str(tmp_path / name), None, SMALL, count=12, eval_count=4)
        assert (calibration.count, evaluation.count) == (12, 4)
        assert not contents(calibration) & contents(evaluation)
        rows = [int(each.removeprefix("row ")) for each in names(calibration)]
        np.testing.assert_array_equal(stream(calibration), array[rows])
        streams.append(calibration.sha256)
    assert len(set(streams)) == 1


def test_raw_arrays_are_preprocessed_like_files(tmp_path):
    raw = np.stack([np.asarray(picture(value)) for value in range(6)])
    np.save(tmp_path / "raw.npy", np.concatenate([raw, raw[:2]]))  # two duplicates
    calibration, evaluation = image_sets(str(tmp_path / "raw.npy"), None, SMALL)
    assert calibration.count + evaluation.count == 6
    rows = [int(each.removeprefix("row ")) % 6 for each in names(calibration)]
    np.testing.assert_array_equal(stream(calibration), [array_from_image(picture(row), SMALL) for row in rows])


def test_an_array_can_be_the_evaluation_set(photos, tmp_path):
    np.save(tmp_path / "raw.npy", np.stack([np.asarray(picture(value)) for value in range(90, 95)]))
    _, evaluation = image_sets(str(photos), str(tmp_path / "raw.npy"), SMALL)
    assert evaluation.count == 5
    assert evaluation.labels is None


def test_a_memory_mapped_array_is_never_loaded_whole(tmp_path):
    array = np.lib.format.open_memmap(tmp_path / "many.npy", mode="w+", dtype=np.float32, shape=(2000, 3, 32, 32))
    array[:] = np.random.default_rng(0).normal(size=(2000, 1, 1, 1))
    whole = array.nbytes
    array.flush()
    del array
    small = Preprocessing(32, 32, 32, 32, "bilinear", (0, 0, 0), (1, 1, 1))
    tracemalloc.start()
    calibration, evaluation = image_sets(str(tmp_path / "many.npy"), None, small, count=1900, eval_count=100)
    seen = sum(len(batch) for images in (calibration, evaluation) for batch in images.batches(32))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seen == 2000
    print(f"peak {peak / 1e6:.1f} MB of {whole / 1e6:.1f} MB")
    assert peak < whole / 5  # measured: a tenth, mostly the names and digests of 2000 pictures


# The built-in sample


def test_sample_photographs_exist_in_the_wheels_and_are_split():
    assert not set(CALIBRATION_PHOTOS) & set(EVALUATION_PHOTOS)
    digests = [
        hashlib.sha256(_path(*photo).read_bytes()).hexdigest() for photo in CALIBRATION_PHOTOS + EVALUATION_PHOTOS
    ]
    assert len(set(digests)) == len(digests) == 10


def test_without_a_folder_both_sets_are_sample_crops_of_different_photographs():
    calibration, evaluation = image_sets(None, None, SMALL, count=40, eval_count=10)
    assert calibration.sample
    assert evaluation.sample
    assert (calibration.count, evaluation.count) == (40, 10)
    assert (len(contents(calibration)), len(contents(evaluation))) == (6, 4)
    assert not contents(calibration) & contents(evaluation)
    values = stream(calibration)
    assert values.shape == (40, 3, 16, 16)
    assert len({crop.tobytes() for crop in values}) == 40
    assert values.min() >= -2
    assert values.max() <= 2


def test_sample_crops_follow_their_seed_and_fewer_are_a_prefix():
    def sample(**options):
        return image_sets(None, None, SMALL, eval_count=1, **options)[0]

    np.testing.assert_array_equal(stream(sample(count=12)), stream(sample(count=20))[:12])
    assert sample(count=12).sha256 == sample(count=20).subset(0, 12).sha256
    assert sample(count=12, seed=1).sha256 != sample(count=12).sha256
    assert not np.array_equal(stream(sample(count=12, seed=1)), stream(sample(count=12)))


def test_a_sample_crop_is_its_window_of_the_photograph_flipped_or_not():
    calibration, _ = image_sets(None, None, SMALL, count=24, eval_count=1)
    flips = []
    for crop, values in zip(calibration.pictures, stream(calibration), strict=True):
        path = next(_path(*photo) for photo in CALIBRATION_PHOTOS if photo[1].endswith(crop.name))
        window = tuple(int(part) for part in crop.window.split(")")[0].strip("(").split(","))
        image = Image.open(path).convert("RGB").crop(window).resize((16, 16), Image.Resampling.BILINEAR)
        expected = (np.asarray(image).transpose(2, 0, 1) / 255 - 0.5) / 0.25
        flips.append("flipped" in crop.window)
        # Flipping before and after the resize may round differently: one level is 1/255/0.25.
        found = values[:, :, ::-1] if flips[-1] else values
        np.testing.assert_allclose(found, expected, atol=1.01 / 255 / 0.25)
    assert set(flips) == {True, False}


def test_random_windows_keep_area_and_aspect_inside_the_photograph():
    rng = np.random.default_rng(0)
    for _ in range(300):
        left, top, right, bottom = random_window(640, 427, rng)
        assert 0 <= left < right <= 640
        assert 0 <= top < bottom <= 427
        if (left, top, right, bottom) == (0, 0, 640, 427):
            continue  # no window fitted
        # Edges are rounded to whole pixels: 2 % covers that at over 200 pixels.
        assert 0.3 * 0.98 <= (right - left) * (bottom - top) / (640 * 427) <= 1
        assert 0.75 * 0.98 <= (right - left) / (bottom - top) <= 4 / 3 * 1.02


# Refusals: one line that names the thing


def test_a_missing_path_is_refused(tmp_path):
    missing = str(tmp_path / "nowhere")
    assert missing in refusal(missing, None)
    assert "does not exist" in refusal("", None)
    message = refusal(None, missing)
    assert missing in message
    assert message.startswith("evaluation path")


def test_a_file_that_is_no_array_is_refused(tmp_path):
    path = str(save(tmp_path, "photo.png", 0))
    message = refusal(path, None)
    assert path in message
    assert "neither a folder nor a .npy/.npz file" in message


def test_a_folder_without_images_is_refused(tmp_path):
    assert f"'{tmp_path}' is empty" in refusal(str(tmp_path), None)
    (tmp_path / "notes.txt").write_text("hello")
    assert f"'{tmp_path}' holds no image files" in refusal(str(tmp_path), None)


def test_a_folder_of_corrupt_images_is_refused_with_the_first_reason(tmp_path):
    for name in ("a.png", "b.jpg"):
        (tmp_path / name).write_text("broken")
    message = refusal(str(tmp_path), None)
    assert str(tmp_path) in message
    assert "2 failed to decode" in message
    assert "cannot identify image file" in message
    assert "evaluation folder" in refusal(None, str(tmp_path))


def test_a_single_image_is_refused_when_one_must_be_held_out(tmp_path):
    path = save(tmp_path, "only.png", 0)
    (tmp_path / "copy.png").write_bytes(path.read_bytes())
    (tmp_path / "broken.png").write_text("broken")
    message = refusal(str(tmp_path), None)
    assert str(tmp_path) in message
    assert "1 distinct readable image" in message
    assert "at least 2" in message


@pytest.mark.parametrize("damaged", [False, True])
def test_an_evaluation_folder_with_only_calibration_images_is_refused(photos, damaged):
    photos /= "other"
    if damaged:
        (photos / "empty.jpg").write_bytes(b"")
    message = refusal(str(photos), str(photos))
    assert str(photos) in message
    assert "not also in the calibration set" in message


def test_images_beside_class_folders_are_refused(tmp_path):
    save(tmp_path, "0/a.png", 0)
    save(tmp_path, "stray.png", 1)
    message = refusal(None, str(tmp_path))
    assert str(tmp_path) in message
    assert "stray.png" in message


def test_a_wnid_outside_the_thousand_classes_is_refused(tmp_path):
    save(tmp_path, "n01440764/a.png", 0)
    save(tmp_path, "n00000001/b.png", 1)
    message = refusal(None, str(tmp_path))
    assert str(tmp_path) in message
    assert "n00000001" in message


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 16, 16), np.float32),
        np.zeros((4, 1, 16, 16), np.float32),
        np.zeros((4, 3, 16, 20), np.float32),
        np.zeros((4, 16, 16, 3), np.float32),
        np.zeros((4, 3, 16, 16), np.float64),
        np.zeros((4, 3, 16, 16), np.uint8),
        np.zeros((0, 3, 16, 16), np.float32),
        np.zeros((4, 0, 16, 3), np.uint8),
        np.float32(3),
    ],
    ids=lambda array: f"{array.dtype}-{array.shape}",
)
def test_arrays_of_another_shape_or_dtype_are_refused(tmp_path, array):
    path = tmp_path / "a.npy"
    np.save(path, array)
    message = refusal(str(path), None)
    assert str(path) in message
    assert f"{array.dtype} of shape {array.shape}" in message
    assert "(N, 3, 16, 16)" in message


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_arrays_with_numbers_that_are_not_finite_are_refused(tmp_path, bad):
    array = np.random.default_rng(0).normal(size=(6, 3, 16, 16)).astype(np.float32)
    array[4, 1, 2, 3] = bad
    path = tmp_path / "a.npy"
    np.save(path, array)
    message = refusal(str(path), None)
    assert str(path) in message
    assert "row 4" in message


@pytest.mark.parametrize("names", [["x", "y"], ["images", "input"], []])
def test_archives_without_one_clear_array_are_refused(tmp_path, names):
    path = tmp_path / "a.npz"
    np.savez(path, **{name: np.zeros((4, 3, 16, 16), np.float32) for name in names})
    message = refusal(str(path), None)
    assert str(path) in message
    assert (", ".join(names) or "(none)") in message


def test_damaged_and_pickled_array_files_are_refused(tmp_path):
    whole, archive = tmp_path / "whole.npy", tmp_path / "whole.npz"
    np.save(whole, np.zeros((4, 3, 16, 16), np.float32))
    np.savez_compressed(archive, np.random.default_rng(0).normal(size=(4, 3, 16, 16)))
    pickled = tmp_path / "pickled.npy"
    np.save(pickled, np.array([{}], dtype=object), allow_pickle=True)
    damaged = bytearray(archive.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    broken = {
        "short.npy": whole.read_bytes()[:-100],
        "short.npz": archive.read_bytes()[:-100],
        "flipped.npz": bytes(damaged),
        "empty.npy": b"",
        "text.npy": b"hello",
        "object.npy": pickled.read_bytes(),
    }
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
        message = refusal(str(tmp_path / name), None)
        assert str(tmp_path / name) in message
        assert "cannot be read" in message


@pytest.mark.parametrize(
    ("options", "named"),
    [({"count": 0}, "image count is 0"), ({"eval_count": -1}, "is -1"), ({"seed": -2}, "seed is -2")],
)
def test_numbers_out_of_range_are_refused(options, named):
    assert named in refusal(None, None, **options)


def test_a_batch_size_below_one_is_refused():
    empty = ImageSet("nothing", SMALL, ())
    with pytest.raises(UserError, match="batch size is 0"):
        next(empty.batches(0))
    assert list(empty.batches(4)) == []


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    message = refusal(None, None)
    assert "'skimage'" in message
    assert "pip install" in message


def of_sources(*counts):
    """A set with so many pictures of each source image."""
    pictures = [
        Picture(f"{source}/{index}", f"content {source}", lambda _: np.zeros((3, 8, 8), np.float32), str(index))
        for source, count in enumerate(counts)
        for index in range(count)
    ]
    return ImageSet("made up", SMALL, tuple(pictures))


@pytest.mark.parametrize("counts", [(3, 1, 4, 1), (5, 2, 6, 3, 5, 4), (1,) * 11])
def test_the_four_parts_share_no_source_image_and_lose_no_picture(counts):
    whole = of_sources(*counts)
    parts = [part for half in whole.halves() for part in half]
    for one, other in itertools.combinations(parts, 2):
        assert not contents(one) & contents(other)
    assert all(part.pictures for part in parts)
    names = [picture.name for part in parts for picture in part.pictures]
    assert sorted(names) == sorted(picture.name for picture in whole.pictures)
    again = [part for half in of_sources(*counts).halves() for part in half]
    assert [[picture.name for picture in part.pictures] for part in again] == [
        [picture.name for picture in part.pictures] for part in parts
    ]


@pytest.mark.parametrize("counts", [(4, 4, 4), (4, 6)])
def test_with_two_or_three_source_images_the_halves_share_none(counts):
    halves = [[*one.pictures, *other.pictures] for one, other in of_sources(*counts).halves()]
    sources = [{picture.content for picture in half} for half in halves]
    assert not sources[0] & sources[1]
    assert sum(map(len, halves)) == sum(counts)


def test_of_one_source_image_the_parts_share_no_picture_and_one_picture_is_every_part():
    parts = [part for half in of_sources(9).halves() for part in half]
    names = [picture.name for part in parts for picture in part.pictures]
    assert len(set(names)) == len(names) == 9
    assert all(part.pictures for part in parts)
    parts = [part for half in of_sources(1).halves() for part in half]
    assert [len(part.pictures) for part in parts] == [1, 1, 1, 1]


def test_pictures_of_one_source_image_have_its_number():
    assert of_sources(2, 1, 3).sources == (0, 0, 1, 2, 2, 2)


@pytest.mark.parametrize("largest", [1.0, 255.0])
@pytest.mark.parametrize("as_evaluation", [False, True])
def test_float_arrays_of_pixels_are_refused(tmp_path, photos, largest, as_evaluation):
    array = np.random.default_rng(0).random((20, 3, SMALL.height, SMALL.width), np.float32) * largest
    np.save(tmp_path / "pixels.npy", array)
    calib, evaluation = (photos, tmp_path / "pixels.npy") if as_evaluation else (tmp_path / "pixels.npy", None)
    with pytest.raises(UserError, match="look like pixels"):
        image_sets(str(calib), evaluation and str(evaluation), SMALL)
    np.save(tmp_path / "pixels.npy", array - largest / 2)
    image_sets(str(calib), evaluation and str(evaluation), SMALL)


def test_pixels_are_what_a_network_without_a_mean_reads(tmp_path):
    plain = replace(SMALL, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    np.save(tmp_path / "pixels.npy", np.random.default_rng(0).random((20, 3, SMALL.height, SMALL.width), np.float32))
    image_sets(str(tmp_path / "pixels.npy"), None, plain)


def test_links_to_folders_count_as_folders_and_one_that_leads_back_ends(tmp_path):
    for name in ("one", "two"):
        (tmp_path / "real" / name).mkdir(parents=True)
        picture(100).save(tmp_path / "real" / name / "0.png")
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "cat").symlink_to(tmp_path / "real" / "one")
    (folder / "dog").symlink_to("../real/two")
    (tmp_path / "real" / "two" / "loop").symlink_to(folder)
    (folder / "cat" / "self").symlink_to(tmp_path / "real" / "one")
    assert list(listed(folder).images) == ["cat/0.png", "dog/0.png"]


def test_what_editors_and_archives_leave_is_no_class_and_no_image(tmp_path):
    for name in ("cat", "dog", ".ipynb_checkpoints", "__MACOSX"):
        (tmp_path / name).mkdir()
        picture(100).save(tmp_path / name / "0.png")
    picture(100).save(tmp_path / "cat" / "._0.png")
    names = list(listed(tmp_path).images)
    assert names == ["cat/0.png", "dog/0.png"]
    assert labels_from_names(tmp_path, names) == {"cat/0.png": 0, "dog/0.png": 1}


def test_labels_in_an_array_file_are_used(tmp_path, photos):
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (5, 20, 20, 3), dtype=np.uint8)
    np.savez(tmp_path / "some.npz", images=raw, labels=np.array([3, 1, 4, 1, 5]))
    _, evaluation = image_sets(str(photos), str(tmp_path / "some.npz"), SMALL)
    order = [int(each.name.removeprefix("row ")) for each in evaluation.pictures]
    assert evaluation.labels == tuple([3, 1, 4, 1, 5][row] for row in order)


@pytest.mark.parametrize(
    "labels", [np.zeros(4, int), np.zeros(5), np.full(5, -1)], ids=["too few", "float", "negative"]
)
def test_labels_that_are_no_class_indices_are_refused(tmp_path, photos, labels):
    np.savez(tmp_path / "some.npz", images=np.zeros((5, 20, 20, 3), np.uint8), labels=labels)
    with pytest.raises(UserError, match="expected 5 class indices"):
        image_sets(str(photos), str(tmp_path / "some.npz"), SMALL)


def test_pictures_that_pillow_does_not_read_are_named(photos):
    for name in ("IMG_1.HEIC", "other/raw.dng", "notes.txt"):
        (photos / name).write_bytes(b"x")
    for images in (image_sets(str(photos), None, SMALL)[0], image_sets(None, str(photos / "other"), SMALL)[1]):
        assert "raw.dng" in "".join(images.other_pictures)
        assert any("kinds that cannot be read" in line and "raw.dng" in line for line in images.left_out())
    assert image_sets(str(photos), None, SMALL)[0].other_pictures == ("IMG_1.HEIC", "other/raw.dng")


def test_a_folder_of_nothing_but_other_pictures_says_so(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"x")
    (tmp_path / "b.HEIC").write_bytes(b"x")
    assert "holds 2 pictures of kinds that cannot be read (.heic)" in refusal(str(tmp_path), None)


def test_duplicates_are_counted_in_both_sets(photos, tmp_path):
    for value in (0, 3, 6):
        (photos / f"again{value}.png").write_bytes((photos / f"{value}.png").read_bytes())
    calibration, evaluation = image_sets(str(photos), None, SMALL)
    assert (calibration.duplicates, evaluation.duplicates) == (3, 0)
    assert calibration.left_out() == ["3 duplicates left out: the same content as another image"]
    for name in ("a", "b"):
        save(tmp_path / "eval", f"{name}.png", 77)
    assert image_sets(str(photos), str(tmp_path / "eval"), SMALL)[1].duplicates == 1


def test_a_closed_folder_is_refused_by_name(photos, monkeypatch):
    import os

    scandir = os.scandir

    def closed(path):
        if str(path).endswith("other"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(UserError, match=r"folder '.*other' cannot be read \(Permission denied\)"):
        image_sets(str(photos), None, SMALL)


def test_a_folder_whose_files_may_not_be_looked_at_is_refused_by_name(photos, monkeypatch):
    is_file = Path.is_file

    def closed(path):
        if path.parent.name == "other":
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", closed)
    with pytest.raises(UserError, match=r"'.*other/.*' cannot be read \(Permission denied\)"):
        image_sets(str(photos), None, SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "can no longer be read .No such file"),
        (lambda path: picture(99).save(path), "has changed since images were chosen"),
        (lambda path: path.write_bytes(b""), "has changed since images were chosen"),
    ],
    ids=["gone", "replaced", "emptied"],
)
def test_a_file_that_goes_or_changes_after_it_was_chosen_is_named(photos, change, message):
    calibration, _ = image_sets(str(photos), None, SMALL)
    change(photos / names(calibration)[5])
    with pytest.raises(UserError, match=f"'{photos / names(calibration)[5]}' {message}"):
        stream(calibration)


def grouped(path, groups):
    rng = np.random.default_rng(0)
    np.savez(path, images=rng.integers(0, 256, (len(groups), 20, 20, 3), dtype=np.uint8), groups=groups)
    return str(path)


def groups_of(images, groups):
    return {groups[int(each.name.removeprefix("row "))] for each in images.pictures}


@pytest.mark.parametrize("kind", [int, str])
def test_rows_of_one_group_count_as_one_source_image(tmp_path, kind):
    groups = [kind(row // 4) for row in range(40)]
    calibration, evaluation = image_sets(grouped(tmp_path / "a.npz", np.array(groups)), None, SMALL, eval_count=8)
    assert calibration.count + evaluation.count == 40
    assert not groups_of(calibration, groups) & groups_of(evaluation, groups)
    assert len(set(calibration.sources)) == len(groups_of(calibration, groups))
    for one, other in itertools.combinations([part for half in calibration.halves() for part in half], 2):
        assert not groups_of(one, groups) & groups_of(other, groups)
    assert "40 rows, 10 groups" in calibration.source


def test_an_evaluation_file_shares_no_group_with_calibration_on_it(tmp_path):
    groups = [row // 4 for row in range(40)]
    path = grouped(tmp_path / "a.npz", np.array(groups))
    calibration, evaluation = image_sets(path, path, SMALL, count=6)
    assert not groups_of(calibration, groups) & groups_of(evaluation, groups)
    assert evaluation.count + evaluation.overlap == 40
    save(tmp_path / "other", "a.png", 1)
    assert image_sets(str(tmp_path / "other"), path, SMALL)[1].overlap == 0


def test_groups_decide_the_digest_and_their_absence_is_said(tmp_path):
    one = image_sets(grouped(tmp_path / "a.npz", np.arange(12) // 2), None, SMALL)[0]
    others = [replace(picture, group="group 0") for picture in one.pictures]
    assert replace(one, pictures=tuple(others)).sha256 != one.sha256
    np.savez(tmp_path / "c.npz", np.load(tmp_path / "a.npz")["images"])
    assert (
        "12 rows, each taken for a source image of its own"
        in image_sets(str(tmp_path / "c.npz"), None, SMALL)[0].source
    )


@pytest.mark.parametrize(
    "groups", [np.zeros(4, int), np.zeros(5), np.array([{}] * 5, object)], ids=["too few", "float", "objects"]
)
def test_groups_that_are_none_are_refused(tmp_path, groups):
    assert "groups" in refusal(grouped_file(tmp_path / "a.npz", groups), None)


def grouped_file(path, groups):
    np.savez(path, images=np.zeros((5, 20, 20, 3), np.uint8), groups=groups)
    return str(path)


def test_one_group_cannot_be_split(tmp_path):
    assert "6 readable images of one group" in refusal(grouped(tmp_path / "a.npz", np.zeros(6, int)), None)
