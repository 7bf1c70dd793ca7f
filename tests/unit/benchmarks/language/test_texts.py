"""Texts that judge calibrate nothing, and a bad file is named in one line."""

import numpy as np
import pytest

from benchmarks.language.texts import Texts, read_texts
from calib.device import CPU
from calib.errors import UserError


@pytest.mark.parametrize("count", [10, 13, 60])
def test_every_text_has_one_role(count):
    texts = Texts(np.arange(count * 3).reshape(count, 3))
    halves = texts.halves(CPU)
    fitted = [row for half in halves for part in half.parts for batch in part for row in batch.tolist()]
    assert all(len(part) for half in halves for part in half.parts)
    assert fitted + texts.judged.tolist() == texts.ids.tolist()
    assert len(texts.judged) == count // 5


GOOD = np.arange(40).reshape(10, 4)
BAD = {
    "another type": (GOOD.astype(np.int32), r"holds int32 \(10, 4\)"),
    "few texts": (GOOD[:9], r"holds int64 \(9, 4\): expected int64 \(N, T\), 10 texts or more"),
    "one token": (GOOD[:, :1], r"holds int64 \(10, 1\)"),
    "one axis": (GOOD[0], r"holds int64 \(4,\)"),
    "negative": (-GOOD, "holds the id -39"),
    "objects": (np.array([None] * 10), "cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_ids_are_refused_in_one_line(tmp_path, case):
    ids, message = BAD[case]
    np.save(tmp_path / "ids.npy", ids)
    with pytest.raises(UserError, match=message) as caught:
        read_texts(tmp_path / "ids.npy")
    assert "\n" not in str(caught.value)


def test_files_that_are_no_array_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_texts(tmp_path / "none.npy")
    np.savez(tmp_path / "several.npz", a=GOOD)
    with pytest.raises(UserError, match=r"holds several arrays: .*np\.save"):
        read_texts(tmp_path / "several.npz")


def test_ids_beyond_the_vocabulary_are_refused():
    Texts(GOOD).require_known(40)
    with pytest.raises(UserError, match="holds the id 39: expected ids from 0 to 38"):
        Texts(GOOD).require_known(39)
