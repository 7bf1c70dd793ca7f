import hashlib
import io
import os
from pathlib import Path

import pytest
import torch

from calib.quantizer import QParams
from calib.store import watch
from calib.store.checkpoint import Checkpoint, UnusableError, read_state, write_state
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


class Trap:
    """What an attacker keeps: reading it would make a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_code_in_a_file_never_runs(tmp_path):
    kept = Checkpoint(tmp_path / "kept.pt")
    write_state(kept.path, {"step": Trap(tmp_path / "trapped")})
    assert kept.load() is None
    (note,) = kept.notes
    assert note.startswith(f"checkpoint '{kept.path}' is no state of this tool (")
    assert note.endswith("begun anew")
    with pytest.raises(UnusableError, match="no state of this tool"):
        read_state(kept.path, [Path])
    assert not (tmp_path / "trapped").exists()


def test_objects_come_back_if_their_class_is_named(tmp_path):
    path = tmp_path / "kept.pt"
    write_state(path, {"params": QParams(torch.ones(2), axis=0)})
    params = read_state(path, [QParams])["params"]
    assert (params.scale.tolist(), params.axis) == ([1.0, 1.0], 0)
    with pytest.raises(UnusableError, match=r"no state of this tool \(it holds calib.quantizer.QParams\)"):
        read_state(path)


def test_a_file_that_holds_something_else_is_not_used(tmp_path):
    buffer = io.BytesIO()
    torch.save([1], buffer)
    (tmp_path / "kept.pt").write_bytes(hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())
    with pytest.raises(UnusableError, match="it holds list"):
        read_state(tmp_path / "kept.pt")
    with pytest.raises(UnusableError, match="damaged"):
        read_state(tmp_path)
