"""Samples of named arrays: read as rows, told apart by content, refused where a row or an engine cannot hold them."""

import numpy as np
import pytest

from calib.errors import UserError
from calib.images.image_set import image_sets
from calib.images.samples import first_samples, inputs_from_file, samples_from_file
from calib.inputs import Input, Inputs

COUNT = 20
ARRAYS = {
    "ids": np.arange(COUNT * 3).reshape(COUNT, 3), "t": np.arange(COUNT, dtype=np.int32),
    "latent": np.random.default_rng(0).normal(size=(COUNT, 2, 2)).astype(np.float32),
    "kept": np.arange(COUNT * 2).reshape(COUNT, 2) % 3 == 0,
}  # fmt: skip
INPUTS = Inputs(
    (
        Input("ids", "int64", (3,)), Input("t", "int32", ()), Input("latent", "float32", (2, 2)),
        Input("kept", "bool", (2,)),
    )
)  # fmt: skip


def saved(path, **changes):
    arrays = {name: array for name, array in {**ARRAYS, **changes}.items() if array is not None}
    np.savez(path, **arrays)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data.npz"


def row_of(index):
    """The oracle: one value after the other."""
    return [float(value) for name in INPUTS.names for value in np.ravel(ARRAYS[name][index])]


def test_the_inputs_are_the_arrays(path):
    assert inputs_from_file(saved(path, labels=np.zeros(COUNT, int), groups=np.zeros(COUNT, int))) == INPUTS


def test_rows_hold_the_arrays_in_order(path):
    found, _ = image_sets(str(saved(path)), None, INPUTS, count=12, eval_count=4)
    assert (found.kind, found.count) == ("samples", 12)
    rows = np.concatenate(list(found.batches(5)))
    assert rows.dtype == np.float32
    for picture, row in zip(found.pictures, rows, strict=True):
        np.testing.assert_array_equal(row, np.float32(row_of(int(picture.name.removeprefix("row ")))))


def test_first_samples_are_repeated_where_there_are_fewer(path):
    arrays = samples_from_file(saved(path), INPUTS)
    np.testing.assert_array_equal(first_samples(arrays, 2), np.float32([row_of(0), row_of(1)]))
    one = {name: array[:1] for name, array in arrays.items()}
    np.testing.assert_array_equal(first_samples(one, 2), np.float32([row_of(0), row_of(0)]))


def test_samples_of_one_group_stay_together_and_labels_are_read_to_judge(path):
    saved(path, groups=np.arange(COUNT) // 4, labels=np.arange(COUNT))
    calibration, evaluation = image_sets(str(path), str(path), INPUTS, count=2)
    assert not {each.group for each in calibration.pictures} & {each.group for each in evaluation.pictures}
    assert evaluation.labels == tuple(int(each.name.removeprefix("row ")) for each in evaluation.pictures)


def test_equal_samples_are_one_and_a_change_of_any_array_makes_another(path, tmp_path):
    twice = {name: np.concatenate([array, array]) for name, array in ARRAYS.items()}
    assert image_sets(str(saved(path, **twice)), None, INPUTS)[0].duplicates == COUNT
    before = image_sets(str(saved(path)), None, INPUTS)[0].sha256
    assert image_sets(str(path), None, INPUTS)[0].sha256 == before
    for name, array in ARRAYS.items():
        other = array.copy()
        other[0] = ~other[0] if array.dtype == bool else other[0] + 100
        assert image_sets(str(saved(tmp_path / f"{name}.npz", **{name: other})), None, INPUTS)[0].sha256 != before


def changed(name, value, kind=None):
    array = ARRAYS[name].astype(kind or ARRAYS[name].dtype)
    array[7] = value
    return {name: array}


REFUSED = {
    "not a number": (changed("latent", np.nan), "nan in row 7 of 'latent'"),
    "beyond FP16": (changed("latent", -7e4), "-70000.0 in row 7 of 'latent': expected numbers from -65504 to 65504"),
    "beyond float32": (changed("ids", 1 + (1 << 24)), "16777217 in row 7 of 'ids'"),
    "the smallest int64": (changed("ids", -(1 << 63)), "-9223372036854775808 in row 7"),
    "another type": (changed("t", 0, np.int64), r"holds t int64 \(N\): expected t int32 \(N\)"),
    "another shape": ({"latent": ARRAYS["latent"][:, :1]}, r"holds latent float32 \(N, 1, 2\): expected"),
    "a missing one": ({"t": None}, "holds no 't': expected ids int64"),
    "one more": ({"more": ARRAYS["t"]}, "holds 'more' beside the inputs"),
    "texts": ({"ids": np.array(["a"] * COUNT)}, "'ids', <U1 of shape"),
    "half": (changed("latent", 0, np.float16), "'latent', float16 of shape"),
    "a number": ({"t": np.int32(3)}, r"'t', int32 of shape \(\)"),
    "no samples": ({name: array[:0] for name, array in ARRAYS.items()}, r"of shape \(0, 3\)"),
    "other numbers of samples": ({"t": ARRAYS["t"][1:]}, "different numbers of samples .ids 20, t 19, latent 20"),
    "objects": ({"ids": np.array([{}] * COUNT, object)}, "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused(path, case):
    changes, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as caught:
        image_sets(str(saved(path, **changes)), None, INPUTS)
    assert "\n" not in str(caught.value)


def test_the_largest_numbers_that_a_row_holds_are_read(path):
    saved(path, **changed("ids", 1 << 24), **changed("latent", 65504.0))
    assert samples_from_file(path, INPUTS)["ids"].max() == 1 << 24


@pytest.mark.parametrize("content", [b"no archive", b""])
def test_a_file_that_is_no_archive_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        inputs_from_file(path)


def test_nothing_but_an_archive_is_taken(tmp_path):
    np.save(tmp_path / "data.npy", ARRAYS["ids"])
    for given in (tmp_path, tmp_path / "data.npy"):
        with pytest.raises(UserError, match=r"expected a \.npz file with an array for every input"):
            image_sets(str(given), None, INPUTS)
    with pytest.raises(UserError, match=r"expected CALIB=, a \.npz file"):
        image_sets(None, None, INPUTS)
