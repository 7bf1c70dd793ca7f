import argparse
import errno
import os
import subprocess
import sys

import pytest

from calib.errors import UserError
from calib.store.digests import file_sha256
from deploy.package import MANIFEST, engine_targets, package_folder, read_json, staging, write_json
from deploy.package_options import add_package, folder_from_options


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write_package(folder, **files):
    """A package as far as `staging` looks at it."""
    write_json(folder / MANIFEST, {"files": {}})
    for name, content in files.items():
        (folder / name).write_text(content)


def test_a_package_appears_only_when_it_is_complete(tmp_path):
    final = tmp_path / "model" / "int8"
    with staging(final) as folder:
        (folder / "a").write_text("1")
        assert not final.exists()
    assert names(final) == ["a"]
    assert names(final.parent) == ["int8"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, UserError])
def test_nothing_is_left_after_a_failure_and_the_old_package_stays(tmp_path, error):
    final = tmp_path / "int8"
    with staging(final) as folder:
        write_package(folder, a="old")
    with pytest.raises(error), staging(final) as folder:  # noqa: PT012 - the block is what is tested
        (folder / "a").write_text("half")
        raise error("stop")
    assert (final / "a").read_text() == "old"
    assert names(tmp_path) == ["int8"]


def test_a_new_package_replaces_the_old_one_whole(tmp_path):
    for name in ("a", "b"):
        with staging(tmp_path / "int8") as folder:
            write_package(folder, **{name: "x"})
    assert names(tmp_path / "int8") == ["b", MANIFEST]


FOREIGN = {
    "folder": lambda path: (path.mkdir(), (path / "thesis.tex").write_text("years of work")),
    "empty folder": lambda path: path.mkdir(),
    "other manifest": lambda path: (path.mkdir(), write_json(path / MANIFEST, {"name": "a web page"})),
    "list": lambda path: (path.mkdir(), (path / MANIFEST).write_text("[]")),
    "no JSON": lambda path: (path.mkdir(), (path / MANIFEST).write_bytes(b"\xff")),
    "file": lambda path: path.write_text("x"),
    "link": lambda path: (path.with_name("else").mkdir(), write_package(path.with_name("else")), path.symlink_to("else")),
    "dead link": lambda path: path.symlink_to("nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("when", ["before", "meanwhile"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_package_is_not_replaced(tmp_path, kind, when):
    final = tmp_path / "int8"
    if when == "before":
        FOREIGN[kind](final)
    with pytest.raises(UserError, match=r"not a package.*not replaced"), staging(final) as folder:  # noqa: PT012
        assert when == "meanwhile", "the run began although there is no place for its result"
        write_package(folder)
        FOREIGN[kind](final)
    assert names(tmp_path) == (["else", "int8"] if kind == "link" else ["int8"])
    if kind == "folder":
        assert (final / "thesis.tex").read_text() == "years of work"


def _dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_what_a_killed_run_left_is_cleaned_up_by_the_next(tmp_path):
    pid = _dead_pid()
    (tmp_path / f".int8.tmp-{pid}").mkdir()
    (tmp_path / f".int8.old-{pid}").mkdir()
    write_package(tmp_path / f".int8.old-{pid}", a="displaced")
    with pytest.raises(RuntimeError), staging(tmp_path / "int8"):
        raise RuntimeError
    assert (tmp_path / "int8" / "a").read_text() == "displaced"
    assert names(tmp_path) == ["int8"]


HOLDING = """
import sys
from pathlib import Path
from deploy.package import staging

with staging(Path(sys.argv[1])):
    print(1, flush=True)
    sys.stdin.read()
"""


def test_a_run_is_refused_while_another_one_writes_the_same_package(tmp_path):
    final = tmp_path / "model" / "int8"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(final)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "1\n"
        before = names(final.parent)
        with pytest.raises(UserError, match=f"another run is writing '{final}': wait"), staging(final):
            pytest.fail("two runs write one package")
        assert names(final.parent) == before, "what the other run has written is left alone"
        with staging(final.with_name("int8_erq")) as folder:
            write_package(folder)
        other.kill()
    with staging(final) as folder:  # a lock ends with its process
        write_package(folder, a="new")
    assert names(final.parent) == ["int8", "int8_erq"]


def test_a_lock_is_free_again_after_a_failure(tmp_path):
    for _ in range(2):
        with pytest.raises(RuntimeError), staging(tmp_path / "int8"):
            raise RuntimeError
    assert names(tmp_path) == []


def test_where_files_cannot_be_locked_nothing_is(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", flock)
    with staging(tmp_path / "int8") as folder:
        write_package(folder)
    assert names(tmp_path) == ["int8"]


def test_a_file_in_the_way_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"output folder '.*int8' cannot be written .*OUT="),
        staging(tmp_path / "file" / "int8"),
    ):
        pass


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_full_or_read_only_disk_is_one_clear_line(tmp_path, code):
    with (
        pytest.raises(UserError, match=f"cannot be written .{os.strerror(code)}"),
        staging(tmp_path / "int8"),
    ):
        raise OSError(code, os.strerror(code))
    assert names(tmp_path) == []


def test_other_errors_keep_their_traceback(tmp_path):
    with pytest.raises(FileNotFoundError), staging(tmp_path / "int8"):
        raise FileNotFoundError(errno.ENOENT, "a bug")


def test_json_with_nan_is_refused_and_bad_json_is_a_user_error(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    (tmp_path / "b.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for name in ("b.json", "missing.json", "list.json", "bytes.json", "deep.json"):
        with pytest.raises(UserError, match=name):
            read_json(tmp_path / name)


def test_a_leftover_of_a_process_with_our_number_does_not_stand_in_the_way(tmp_path):
    (tmp_path / f".int8.tmp-{os.getpid()}").mkdir()
    with staging(tmp_path / "int8") as folder:
        write_package(folder, a="new")
    assert names(tmp_path) == ["int8"]


@pytest.mark.parametrize("name", [".int8.tmp-old", ".int8.old-note"])
def test_folders_of_others_stay(tmp_path, name):
    (tmp_path / name).mkdir()
    with staging(tmp_path / "int8") as folder:
        write_package(folder, a="new")
    assert names(tmp_path) == [name, "int8"]


def test_a_closed_input_is_not_called_a_closed_output(tmp_path):
    closed = tmp_path / "photos" / "0.jpg"
    with pytest.raises(UserError, match=f"'{closed}' cannot be read") as caught, staging(tmp_path / "out" / "int8"):
        raise PermissionError(errno.EACCES, "Permission denied", str(closed))
    assert "output" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "module", "weights", "recipe", "folder"),
    [
        ("vit_b", None, "auto", "int8", "out/vit_b/int8"),
        ("a/b", "", "random", "x/my.v2.toml", "out/a_b-random-weights/my.v2"),
        ("dinov2_s", "nets/mine.py:build", "last.ckpt", "int8", "out/mine.build/int8"),
        ("dinov2_s", "package.models:make", "random", "int8", "out/models.make-random-weights/int8"),
    ],
)
def test_the_folder_of_a_package_follows_its_options(model, module, weights, recipe, folder):
    assert str(package_folder("out", model, module, weights, recipe)) == folder


def test_a_checkpoint_names_only_the_package_that_was_built_from_it(tmp_path):
    parser = argparse.ArgumentParser()
    add_package(parser)
    built, other = tmp_path / "built.pt", tmp_path / "other.pt"
    built.write_bytes(b"one")
    other.write_bytes(b"two")
    folder = tmp_path / "out" / "test_vit" / "int8"
    folder.mkdir(parents=True)
    weights = {"source": "file built.pt", "file_sha256": file_sha256(built)}
    write_json(folder / MANIFEST, {"weights": weights})

    def named(*given):
        args = parser.parse_args(["--model", "test_vit", "--out", str(tmp_path / "out"), *given])
        return folder_from_options(args, args.folder)

    assert named() == named("--weights", str(built)) == named(str(folder), "--weights", str(other)) == folder
    for wrong in (other, tmp_path / "missing.pt"):
        with pytest.raises(UserError, match=r"was built from other weights .file built.pt.: give the file"):
            named("--weights", str(wrong))
    assert named("--weights", str(other), "--recipe", "int8_erq") == folder.with_name("int8_erq")  # there is none


def test_what_an_engine_is_for_is_read_from_the_manifest(tmp_path):
    assert engine_targets(tmp_path) == ()
    write_json(tmp_path / MANIFEST, {"engine": {"targets": ["SM89", 3]}})
    assert engine_targets(tmp_path) == ("SM89",)
    write_json(tmp_path / MANIFEST, {"engine": []})
    assert engine_targets(tmp_path) == ()
