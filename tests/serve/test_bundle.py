"""Packages of several models, and files beside them, in one repository."""

import hashlib
import json
import subprocess

import numpy as np
import pytest

from calib.errors import UserError
from deploy.errors import ContractError
from deploy.measure.onnx_runner import OnnxRunner
from deploy.serve.activate import activate, rollback
from deploy.serve.bundle import models_of, require_unchanged
from deploy.serve.client import Client
from deploy.serve.preflight import Allowed
from deploy.serve.repository import write_repository
from deploy.serve.server import running
from deploy.serve.shipped import shipped_from_package
from tests.serve.conftest import sentences
from tests.serve.environments import ROOT
from tests.serve.test_activate import StandIn, named

pytestmark = pytest.mark.slow
TEXT = "text_network.Sentence-random-weights"
ALLOW = ["--allow-random-weights", "--allow-unexecuted"]


def command(serve_python, verb, *words):
    """What the command line says in an environment without torch."""
    words = [serve_python, "-m", "deploy", verb, *map(str, words)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def scale(tmp_path):
    (tmp_path / "clip.json").write_text('{"logit_scale": 100.0}')
    return tmp_path / "clip.json"


def test_two_models_are_written_checked_served_and_switched_together(
    serve_python, triton, package, newer, sentence, scale, tmp_path
):
    repository = tmp_path / "models"
    done = command(serve_python, "preflight", package, sentence, "--cpu", *ALLOW)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": may be served here") == 2
    done = command(serve_python, "serve-repo", package, sentence, "--repo", repository, "--file", scale, *ALLOW)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"written to {repository}: test_vit_cpu, test_vit_cpu_jpeg, {TEXT}_cpu\n"
    assert "no engine of 'test_vit' in the repository: model.engine is of tensorrt_rtx" in done.stderr
    assert sorted(each.name for each in repository.iterdir() if each.is_file()) == ["clip.json", "files.json"]
    images, texts = np.ones((2, 3, 160, 160), np.float32), sentences(2)
    with running(triton, repository) as server:
        client = Client(server.http)
        found = client.answer("test_vit_cpu", {"input": images})["output"]
        assert np.array_equal(found, OnnxRunner(package / "model.fp32.onnx")(images))
        found = client.answer(f"{TEXT}_cpu", texts)["output"]
        assert np.array_equal(found, OnnxRunner(sentence / "model.fp32.onnx")(texts))
        shared = ["--repo", repository, "--url", server.http]
        done = command(serve_python, "activate", newer, sentence, *shared, *ALLOW)
        assert done.returncode == 0, done.stderr
        assert done.stdout == (
            f"test_vit_cpu: version 2 serves, before it 1\n{TEXT}_cpu: version 2 serves, before it 1\n"
        )
        found = client.answer("test_vit_cpu", {"input": images})["output"]
        assert np.array_equal(found, OnnxRunner(newer / "model.fp32.onnx")(images))
        done = command(serve_python, "rollback", "test_vit", TEXT, *shared)
        assert done.stdout.count("version 1 serves, before it 2") == 2, done.stderr


def test_both_switch_or_neither(package, newer, sentence, tmp_path):
    repository = tmp_path / "models"
    write_repository([shipped_from_package(each) for each in (package, sentence)], repository, None, Allowed())
    server = StandIn(repository)
    server.refuses = {(f"{TEXT}_cpu", 2)}
    packages = [shipped_from_package(each) for each in (newer, sentence)]
    with pytest.raises(ContractError, match="UNAVAILABLE"):
        activate(packages, repository, server, None, Allowed())
    assert [named(repository, model) for model in ("test_vit_cpu", f"{TEXT}_cpu")] == [1, 1]
    assert server.loaded == {"test_vit_cpu": 1, f"{TEXT}_cpu": 1}
    assert not (repository / "test_vit_cpu/2").exists()
    assert activate(packages[:1], repository, server, None, Allowed()) == {"test_vit_cpu": (1, 2)}  # one alone
    with pytest.raises(UserError, match=f"'{TEXT}_cpu' serves version 1: expected an older one"):
        rollback(repository, server, "test_vit", TEXT)
    assert named(repository, "test_vit_cpu") == 2


def test_packages_of_one_name_are_one_model_or_are_refused(package, newer, sentence, changed, engine):
    first, second = shipped_from_package(package), shipped_from_package(newer)
    assert [*models_of([first, shipped_from_package(sentence)])] == ["test_vit", TEXT]
    with pytest.raises(UserError, match=r"several packages of 'test_vit' are for SM89"):
        models_of([first, second])
    other = shipped_from_package(changed(sentence, model="test_vit"))
    with pytest.raises(UserError, match="would have one name and differ in model, tensors or preprocessing"):
        models_of([first, other])
    assert [*models_of([shipped_from_package(engine("SM80")), shipped_from_package(engine("SM120"))])] == ["test_vit"]
    other = shipped_from_package(changed(sentence, model="test_vit_cpu"))
    with pytest.raises(UserError, match="'test_vit' and 'test_vit_cpu' would both be called 'test_vit_cpu'"):
        models_of([first, other])


def test_two_packages_of_one_name_are_one_line_of_the_command_line(serve_python, package, newer, tmp_path):
    for verb, more in (("serve-repo", ["--repo", tmp_path / "models"]), ("preflight", ["--cpu"])):
        done = command(serve_python, verb, package, newer, *more, *ALLOW)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "several packages of 'test_vit' are for SM89" in done.stderr
    assert not (tmp_path / "models").exists()


def test_labels_of_several_models_are_refused(package, sentence, tmp_path):
    packages = [shipped_from_package(each) for each in (package, sentence)]
    with pytest.raises(UserError, match="LABELS= names the classes of one model, not of 2"):
        write_repository(packages, tmp_path / "models", None, Allowed(), tmp_path / "labels")


def test_a_file_beside_the_models_is_recorded_and_must_stay_as_it_is(package, scale, tmp_path):
    repository, packages = tmp_path / "models", [shipped_from_package(package)]
    write_repository(packages, repository, "net", Allowed(), files=[scale])
    digest = hashlib.sha256(scale.read_bytes()).hexdigest()
    assert json.loads((repository / "files.json").read_text()) == {
        "files": {"clip.json": {"sha256": digest, "bytes": scale.stat().st_size}}
    }
    require_unchanged(repository)
    for change in ((repository / "clip.json").unlink, lambda: (repository / "clip.json").write_text("{}")):
        change()
        with pytest.raises(UserError, match=r"clip.json' is missing or has changed since the repository was written"):
            activate(packages, repository, StandIn(repository), "net", Allowed())


FILES = {
    "missing": ("nothing.json", "no such file"),
    "a folder": ("folder", "no such file; expected files to ship beside the models, no folders"),
    "the record itself": ("files.json", "'files.json' cannot lie beside the models"),
    "a hidden file": (".secret", "'.secret' cannot lie beside the models"),
    "the name of a model": ("net", "'net' cannot lie beside the models"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_cannot_lie_beside_the_models_are_refused(package, tmp_path, case):
    name, said = FILES[case]
    (tmp_path / "folder").mkdir()
    for each in ("files.json", ".secret", "net"):
        (tmp_path / each).write_text("{}")
    with pytest.raises(UserError, match=said):
        write_repository(
            [shipped_from_package(package)], tmp_path / "models", "net", Allowed(), files=[tmp_path / name]
        )
    assert not (tmp_path / "models").exists()
