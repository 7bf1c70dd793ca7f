"""What is kept stays within a limit, and goes when it is asked to."""

import os

import pytest

from calib.errors import UserError
from calib.store.user_cache import cache_folder, clear, trim
from deploy import cli


def file(path, size, changed):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    os.utime(path, (changed, changed))
    return path


def test_what_changed_longest_ago_goes_first(tmp_path):
    old, middle, new = (file(tmp_path / "s" / name, 10, at) for name, at in (("c", 1), ("a", 2), ("b", 3)))
    trim(tmp_path, 30)
    assert old.exists(), "within the limit nothing goes"
    trim(tmp_path, 29)
    assert [path.exists() for path in (old, middle, new)] == [False, True, True]
    trim(tmp_path, 0)
    assert not middle.exists()
    assert not new.exists()


def test_a_file_that_vanishes_meanwhile_is_no_error(tmp_path, monkeypatch):
    for name in "abc":
        file(tmp_path / name, 10, 1)
    unlink = type(tmp_path).unlink

    def taken(path):
        unlink(path)
        unlink(path)  # as if another process had been first

    monkeypatch.setattr(type(tmp_path), "unlink", taken)
    trim(tmp_path, 0)
    assert not [*tmp_path.iterdir()]


def test_clean_cache_removes_all_of_it_and_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    other = file(tmp_path / "others" / "kept", 10, 1)
    kept = file(cache_folder("stages") / "state.pt", 2_000_000, 1)
    assert cli.main(["clean-cache"]) == 0
    assert capsys.readouterr().out == f"removed 2 MB from '{tmp_path / 'int8-engine'}'\n"
    assert not kept.parent.parent.exists()
    assert other.exists()
    assert cli.main(["clean-cache"]) == 0, "where nothing is kept nothing goes"


def test_a_link_in_its_place_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target = file(tmp_path / "elsewhere" / "mine", 10, 1)
    (tmp_path / "int8-engine").symlink_to(target.parent)
    with pytest.raises(UserError, match="cannot be removed"):
        clear()
    assert target.exists()
