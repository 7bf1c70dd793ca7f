"""Photographs out of a Debian package: the two archive formats against writers of their own, and a mirror that lies."""

import io
import struct
import tarfile
from pathlib import Path

import pytest

from benchmarks import photographs

FLOWER, BIRD = b"RIFF flower", b"RIFF the bird"


def deb(members):
    """An `ar` archive, in the order of Debian's format: a name of 16 characters, 32 of no interest, the size in 10."""
    parts = [b"!<arch>\n"]
    for name, content in members.items():
        parts.append(f"{name:<16}{'':<32}{len(content):<10}`\n".encode() + content + b"\n" * (len(content) % 2))
    return b"".join(parts)


def rcc(version, folder, files, flags=0):
    """A binary resource of Qt: the root holds `folder`, which holds `files`."""
    names, contents, nodes = b"", b"", []

    def named(name):
        nonlocal names
        at = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        return at

    date = b"\0" * 8 if version > 1 else b""
    nodes.append(struct.pack(">IHII", 0, 2, 1, 1) + date)
    nodes.append(struct.pack(">IHII", named(folder), 2, len(files), 2) + date)
    for name, content in files.items():
        nodes.append(struct.pack(">IHHHI", named(name), flags, 0, 0, len(contents)) + date)
        contents += struct.pack(">I", len(content)) + content
    tree = b"".join(nodes)
    header = struct.pack(">4I", version, 20, 20 + len(tree), 20 + len(tree) + len(contents))
    return b"qres" + header + tree + contents + names


def package(suffix="xz"):
    """A Debian package with one photograph, one drawing and one sound for every activity."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode=f"w:{suffix}") as archive:
        for activity in photographs.ACTIVITIES:
            content = rcc(3, "bilder", {"a.webp": FLOWER + activity.encode(), "b.svg": b"<svg/>", "c.ogg": b"odd"})
            entry = tarfile.TarInfo(f"./usr/share/gcompris-qt/rcc/{activity}.rcc")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return deb({"debian-binary": b"2.0", "control.tar.xz": b"unread", f"data.tar.{suffix}": tar.getvalue()})


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_resource_is_read_with_its_paths(version):
    files = {"flower.webp": FLOWER, "Käfer.webp": BIRD}
    found = dict(photographs.resource_files(rcc(version, "grün", files)))
    assert found == {f"grün/{name}": content for name, content in files.items()}


def test_what_is_compressed_is_left_out():
    assert not dict(photographs.resource_files(rcc(3, "images", {"flower.webp": FLOWER}, flags=1)))


def test_an_archive_gives_its_members_whatever_their_length():
    members = {"odd": b"123", "even": b"1234", "empty": b"", "last": b"5"}
    assert dict(photographs.ar_members(deb(members))) == members


@pytest.fixture
def mirror(monkeypatch, tmp_path):
    """A folder that serves as the only mirror of a package with five photographs."""
    path = tmp_path / "mirror" / photographs.PACKAGE
    path.parent.mkdir(parents=True)
    path.write_bytes(package())
    monkeypatch.setattr(photographs, "MIRRORS", ((tmp_path / "mirror").as_uri(),))
    monkeypatch.setattr(photographs, "SHA256", photographs.hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(photographs, "TO_CALIBRATE", 3)
    return path


def test_photographs_are_dealt_to_two_folders_the_same_way_each_time(mirror, tmp_path):
    assert mirror.exists()
    for run in ("one", "two"):
        assert photographs.main([str(tmp_path / run)]) == 0
    one, two = ({file.relative_to(root): file.read_bytes() for file in root.rglob("*.webp")}
                for root in (tmp_path / "one", tmp_path / "two"))  # fmt: skip
    assert one == two
    assert sorted(one.values()) == sorted(FLOWER + activity.encode() for activity in photographs.ACTIVITIES)
    assert [len([path for path in one if path.parts[0] == part]) for part in ("calib", "eval")] == [3, 2]
    assert Path("calib/erase-a.webp") in one or Path("eval/erase-a.webp") in one


@pytest.mark.parametrize("served", [b"something else", None])
def test_a_mirror_without_the_package_is_one_line_and_nothing_is_written(mirror, tmp_path, capsys, served):
    mirror.unlink() if served is None else mirror.write_bytes(served)
    assert photographs.main([str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert photographs.PACKAGE in line
    assert ("No such file" if served is None else "another sha256") in line
    assert not (tmp_path / "out").exists()


def test_the_folder_must_be_named(capsys):
    assert photographs.main([]) == 2
    assert "expected one argument" in capsys.readouterr().err
