import os

import pytest

from calib.store import watch
from calib.store.checkpoint import Checkpoint
from calib.store.watch import UNWATCHED, Watch


def test_what_was_kept_last_comes_back_until_it_is_removed(tmp_path):
    kept = Checkpoint.of(tmp_path / "deep", "stage", {"a": 1})
    assert kept.load() is None
    kept.save({"step": 1})
    kept.save({"step": 2})
    again = Checkpoint.of(tmp_path / "deep", "stage", {"a": 1})
    assert again.load() == {"step": 2}
    assert again.notes == (f"went on from checkpoint '{kept.path}'",)
    assert list((tmp_path / "deep").iterdir()) == [kept.path]
    again.remove()
    assert kept.load() is None


@pytest.mark.parametrize(("stage", "run"), [("stage", {"a": 2}), ("stage", {"a": 1, "b": 0}), ("other", {"a": 1})])
def test_another_run_has_another_file(tmp_path, stage, run):
    Checkpoint.of(tmp_path, "stage", {"a": 1}).save({"step": 1})
    assert Checkpoint.of(tmp_path, stage, run).load() is None


@pytest.mark.parametrize("damage", [
    lambda data: data[: len(data) // 2], lambda _: b"", lambda _: b"hello",
    lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
], ids=["half", "empty", "other", "one bit"])  # fmt: skip
def test_a_damaged_one_is_not_used_and_said(tmp_path, damage):
    kept = Checkpoint.of(tmp_path, "stage", {})
    kept.save({"step": 1})
    kept.path.write_bytes(damage(kept.path.read_bytes()))
    assert kept.load() is None
    assert kept.notes == (f"checkpoint '{kept.path}' is damaged: begun anew",)


def test_a_disk_that_is_full_loses_nothing_and_is_said(tmp_path, monkeypatch):
    kept = Checkpoint.of(tmp_path, "stage", {})
    kept.save({"step": 1})

    def breaks(*_args):
        raise OSError(28, "disk full")

    monkeypatch.setattr(os, "fsync", breaks)
    unlucky = Checkpoint.of(tmp_path, "stage", {})
    unlucky.save({"step": 2})
    unlucky.save({"step": 3})
    assert unlucky.notes == (f"not kept for interruptions: {tmp_path} cannot be written (disk full)",)
    assert list(tmp_path.iterdir()) == [kept.path]
    assert kept.load() == {"step": 1}


def test_a_checkpoint_belongs_to_the_code_that_made_it(tmp_path, monkeypatch):
    watch_here = Watch(folder=tmp_path)
    watch_here.checkpoint("stage", dict).save({"step": 1})
    assert watch_here.checkpoint("stage", dict).load() == {"step": 1}
    monkeypatch.setattr(watch, "made_by", lambda: {"code": "other"})
    assert watch_here.checkpoint("stage", dict).load() is None


def test_without_a_folder_nothing_is_kept_nor_described():
    nothing = UNWATCHED.checkpoint("stage", pytest.fail)
    nothing.save({"step": 1})
    nothing.remove()
    assert nothing.load() is None
    assert nothing.notes == ()
