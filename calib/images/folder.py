"""A folder of images: its image files, how one is read, and the labels that its subfolders give."""

import functools
import hashlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from calib.errors import UserError
from calib.images.picture import ImageCandidate, Picture, Unreadable
from calib.images.preprocess import Preprocessing, array_from_image, rgb_image

WNID = re.compile(r"n\d{8}")
# Pictures that Pillow does not read: of phones, of cameras, drawn ones.
OTHER_PICTURES = (
    ".heic", ".heif", ".hif", ".jxl", ".jxr", ".wdp", ".svg", ".svgz", ".xcf", ".dng", ".raw", ".cr2", ".cr3", ".crw",
    ".nef", ".nrw", ".arw", ".srf", ".sr2", ".raf", ".orf", ".rw2", ".pef", ".srw", ".x3f",
)  # fmt: skip


@dataclass(frozen=True)
class Listing:
    """The files of a folder: paths relative to it, with "/", sorted."""

    images: tuple[str, ...]  # that Pillow can read by their extension
    other_pictures: tuple[str, ...]  # that no plug-in of Pillow reads


def listed(folder: Path) -> Listing:
    """The pictures among all files below `folder`.

    Links to folders are followed; hidden files and folders are left out. Raises UserError for a folder that is closed.
    """
    extensions = {ext for ext, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    images, others = [], []
    for path in _files(folder):
        suffix, name = path.suffix.lower(), path.relative_to(folder).as_posix()
        if suffix in extensions:
            images.append(name)
        elif suffix in OTHER_PICTURES:
            others.append(name)
    return Listing(tuple(sorted(images)), tuple(sorted(others)))


def _hidden(name: str) -> bool:
    """Whether an editor or archiver put it there: `.ipynb_checkpoints`, `._0001.jpg`, `__MACOSX`."""
    return name.startswith(".") or name == "__MACOSX"


def _closed(error: OSError) -> None:
    raise UserError(
        f"folder '{error.filename}' cannot be read ({error.strerror}): expected folders that this user may read"
    ) from error


def _files(folder: Path) -> Iterator[Path]:
    """Yield all files below `folder`, through links to folders, without hidden ones.

    Raises UserError for a folder that cannot be read.
    """
    for root, folders, files in os.walk(folder, onerror=_closed, followlinks=True):
        place = Path(root)
        around = [each.resolve() for each in place.parents if each == folder or folder in each.parents]
        if place.is_symlink() and place.resolve() in around:
            folders.clear()  # a link that leads back to a folder it was reached through
            continue
        folders[:] = sorted(name for name in folders if not _hidden(name))
        shown = (place / name for name in files if not _hidden(name))
        try:
            yield from (path for path in shown if path.is_file())
        except PermissionError as error:  # a folder whose names may be read and whose files may not
            _closed(error)


def _read_file(path: Path, content: str, preprocessing: Preprocessing) -> np.ndarray:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"image '{path}' can no longer be read ({error.strerror}): expected the files that were there when images were "
            f"chosen; leave the folder as it is while the tool runs"
        ) from error
    if hashlib.sha256(data).hexdigest() != content:
        raise UserError(
            f"image '{path}' has changed since images were chosen: expected the same bytes; leave the folder as it is while "
            f"the tool runs"
        )
    with Image.open(io.BytesIO(data)) as image:
        return array_from_image(image, preprocessing)


def _examined(folder: Path, name: str) -> Picture | Unreadable:
    try:
        data = (folder / name).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            rgb_image(image)
    # Pillow's plug-ins raise anything on damaged bytes: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        said = re.sub(r" <_io\.\w+ object at 0x[0-9a-f]+>", "", str(error))  # Pillow names its stream
        return Unreadable(name, f"{type(error).__name__}: {said}")
    content = hashlib.sha256(data).hexdigest()
    return Picture(name, content, functools.partial(_read_file, folder / name, content))


def file_candidates(folder: Path, names: Sequence[str]) -> list[ImageCandidate]:
    """One candidate per name; a call of the candidate reads and decodes the file once."""
    return [functools.partial(_examined, folder, name) for name in names]


def _class_name(name: str) -> str:
    """The class folder of an image: the folder above it that is an ImageNet wnid (not `val/`), else the topmost one."""
    folders = PurePosixPath(name).parts[:-1]
    return next((folder for folder in folders if WNID.fullmatch(folder)), folders[0])


def labels_from_names(folder: Path, names: Sequence[str]) -> dict[str, int] | None:
    """The class index of each image, or None when the folders name no classes (no subfolder, or only one).

    1. Folders named as ImageNet wnids: the index among the 1000 classes.
    2. Folders named as integers: that integer.
    3. Other names: their place in sorted order.

    Raises `UserError` for a wnid outside ImageNet-1k and for images both beside and inside class folders.
    """
    loose = [name for name in names if "/" not in name]
    if len(loose) == len(names):
        return None
    if loose:
        raise UserError(
            f"evaluation folder '{folder}' holds {len(loose)} images (first: '{loose[0]}') beside its class "
            f"folders: expected every image inside one; move or delete them"
        )
    classes = {name: _class_name(name) for name in names}
    distinct = sorted(set(classes.values()))
    if all(WNID.fullmatch(each) for each in distinct):  # 1
        from timm.data import ImageNetInfo

        index = {wnid: place for place, wnid in enumerate(ImageNetInfo().label_names())}
        if unknown := [each for each in distinct if each not in index]:
            raise UserError(
                f"evaluation folder '{folder}' has class folder '{unknown[0]}': expected wnids of the 1000 "
                f"ImageNet classes; remove it or rename the class folders to integers"
            )
    elif all(each.isdecimal() for each in distinct):  # 2
        index = {each: int(each) for each in distinct}
    elif len(distinct) > 1:  # 3
        index = {each: place for place, each in enumerate(distinct)}
    else:
        return None
    return {name: index[each] for name, each in classes.items()}
