"""What one repository may hold together: the packages of one model or of several, and files of the user's beside them."""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from calib.errors import UserError
from calib.store.digests import file_sha256
from deploy.package import write_json
from deploy.serve.configs import CPU, DECODE, JPEG, PREPROCESS
from deploy.serve.shipped import Shipped, served_name
from deploy.verify import recorded_sha256

FILES = "files.json"  # name -> sha256 and bytes of each file beside the models
FILE_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}"


def require_one_model(packages: Sequence[Shipped]) -> None:
    """Raise UserError unless the packages are one network built for several GPU architectures, each for others."""
    first, *others = packages
    for other in others:
        if other.contract != first.contract or other.model != first.model:
            raise UserError(
                f"'{other.folder}' and '{first.folder}' would have one name and differ in model, tensors or preprocessing: "
                f"expected one model built for several GPUs, or models of other names; write a repository for each"
            )
    targets = [target for each in packages for target in each.targets]
    if twice := {target for target in targets if targets.count(target) > 1}:
        raise UserError(
            f"several packages of '{first.model}' are for {min(twice)}: expected one for each GPU architecture"
        )


def models_of(packages: Sequence[Shipped], name: str | None = None) -> dict[str, list[Shipped]]:
    """The packages by the name under which a server has them: `name` for all, or that of each.

    Raises UserError where packages of one name are no single model, or where one model's names are another's too.
    """
    found: dict[str, list[Shipped]] = {}
    for each in packages:
        found.setdefault(served_name(each, name), []).append(each)
    owner: dict[str, str] = {}
    for model, group in found.items():
        require_one_model(group)
        for end in ("", CPU):
            for companion in ("", PREPROCESS, JPEG, DECODE):
                other = owner.setdefault(model + end + companion, model)
                if other != model:
                    raise UserError(
                        f"'{other}' and '{model}' would both be called '{model + end + companion}': write a repository for "
                        f"each, with --name"
                    )
    return found


def require_files(files: Sequence[Path], taken: Mapping[str, object]) -> None:
    """Raise UserError unless `files` can lie beside the models of the names `taken`: files of plain, different names."""
    names = [each.name for each in files]
    for path in files:
        if not path.is_file():
            raise UserError(f"FILES={path}: no such file; expected files to ship beside the models, no folders")
        if not re.fullmatch(FILE_NAME, path.name) or path.name in (FILES, *taken) or names.count(path.name) > 1:
            raise UserError(
                f"FILES={path}: '{path.name}' cannot lie beside the models; expected letters, digits, _ . and -, each name "
                f"once, none of a model and not {FILES}"
            )


def copy_files(files: Sequence[Path], repository: Path) -> None:
    """Put `files` beside the models, where a server reads folders alone, and record their digests."""
    recorded = {}
    for path in files:
        shutil.copyfile(path, repository / path.name)
        copy = repository / path.name
        recorded[path.name] = {"sha256": file_sha256(copy), "bytes": copy.stat().st_size}
    if recorded:
        write_json(repository / FILES, {"files": recorded})


def require_unchanged(repository: Path) -> None:
    """Raise UserError if a file beside the models is missing or is no longer the one that was put there."""
    if not (repository / FILES).exists():
        return
    for name, digest in recorded_sha256(repository / FILES).items():
        path = repository / name
        if not path.is_file() or file_sha256(path) != digest:
            raise UserError(
                f"'{path}' is missing or has changed since the repository was written (sha256 differs): write it again"
            )
