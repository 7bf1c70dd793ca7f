"""`make photographs`: downloads calibration and evaluation images, for users without a data set.

    python -m benchmarks.photographs FOLDER

They are photographs of animals, monuments and musicians from GCompris, an educational suite, under free licences that the
package names. They are read from a Debian package of 44 MB and written to FOLDER/calib and FOLDER/eval, for CALIB= and
EVAL= of the Makefile. The package is pinned by sha256 before it is read, so two short readers of its formats (ar, Qt's .rcc)
are safe enough, and no tool of Debian or Qt has to be installed.
"""

import hashlib
import io
import struct
import sys
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

PACKAGE = "pool/main/g/gcompris-qt/gcompris-qt-data_3.1-2_all.deb"
SHA256 = "e9cf06ab2105529068df73085784e835d2ff03f870d2a8091f09125d40abac9f"
MIRRORS = ("http://deb.debian.org/debian", "https://snapshot.debian.org/archive/debian/20250520T000000Z")
TIMEOUT = 60  # seconds without data
ACTIVITIES = ("erase", "explore_farm_animals", "explore_monuments", "explore_world_animals", "explore_world_music")
TO_CALIBRATE = 80  # calibration images; the others are for evaluation


def download() -> bytes:
    """The bytes of the Debian package. Raises OSError if no mirror has it; the message names the reasons."""
    failures = []
    for mirror in MIRRORS:
        try:
            with urllib.request.urlopen(f"{mirror}/{PACKAGE}", timeout=TIMEOUT) as answer:
                content = answer.read()
        except OSError as error:
            failures.append(f"{mirror}: {error}")
            continue
        if hashlib.sha256(content).hexdigest() == SHA256:
            return content
        failures.append(f"{mirror}: a file of another sha256")
    raise OSError(f"{PACKAGE} cannot be downloaded: {'; '.join(failures)}")


def ar_members(archive: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of each member of an `ar` archive, the format of a .deb file."""
    at = 8  # after "!<arch>\n"
    while at < len(archive):
        name, size = archive[at : at + 16].decode().strip(" /"), int(archive[at + 48 : at + 58])
        at += 60
        yield name, archive[at : at + size]
        at += size + size % 2


def resource_files(resource: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of each uncompressed file in a binary resource of Qt (.rcc)."""
    version, tree, contents, names = struct.unpack_from(">4x4I", resource)
    node_size = 14 if version == 1 else 22

    def node(index: int, folder: PurePosixPath) -> Iterator[tuple[str, bytes]]:
        at = tree + index * node_size
        name_at, flags = struct.unpack_from(">IH", resource, at)
        (length,) = struct.unpack_from(">H", resource, names + name_at)
        text_at = names + name_at + 6
        path = folder / resource[text_at : text_at + 2 * length].decode("utf-16-be") if index else folder
        if flags & 2:
            count, first = struct.unpack_from(">2I", resource, at + 6)
            for child in range(first, first + count):
                yield from node(child, path)
        elif not flags & 1:
            start = contents + struct.unpack_from(">I", resource, at + 10)[0]
            (size,) = struct.unpack_from(">I", resource, start)
            yield str(path), resource[start + 4 : start + 4 + size]

    yield from node(0, PurePosixPath())


def photographs(package: bytes) -> dict[str, bytes]:
    """File name -> content of the images in the Debian package. Raises ValueError if one of the archives is missing."""
    data = next(content for name, content in ar_members(package) if name.startswith("data.tar"))
    found = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for activity in ACTIVITIES:
            resource = archive.extractfile(f"./usr/share/gcompris-qt/rcc/{activity}.rcc")
            if resource is None:
                raise ValueError(f"{activity}.rcc is no file in {PACKAGE}")
            for path, content in resource_files(resource.read()):
                if path.endswith(".webp"):
                    found[f"{activity}-{PurePosixPath(path).name}"] = content
    return found


def main(arguments: list[str]) -> int:
    """Download the images and write them to both folders; returns the exit code.

    The digests of their names decide which folder they go to, so that both have some of every kind.
    """
    if len(arguments) != 1:
        print("expected one argument, the folder to write to: python -m benchmarks.photographs FOLDER", file=sys.stderr)
        return 2
    try:
        found = photographs(download())
        dealt = sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest())
        for index, name in enumerate(dealt):
            folder = Path(arguments[0], "calib" if index < TO_CALIBRATE else "eval")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(found[name])
    except OSError as error:
        print(f"photographs: {error}", file=sys.stderr)
        return 2
    print(f"{TO_CALIBRATE} photographs in {arguments[0]}/calib, {len(found) - TO_CALIBRATE} in {arguments[0]}/eval")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
