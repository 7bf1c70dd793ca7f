"""What a model repository holds, and what is not written into one."""

import hashlib
import json

import pytest

from calib.errors import UserError
from deploy.lock import locked
from deploy.package import MANIFEST
from deploy.serve.configs import config_from_text
from deploy.serve.preflight import Allowed
from deploy.serve.repository import write_repository
from deploy.serve.shipped import shipped_from_package

pytestmark = pytest.mark.slow


def written(folders, target, allowed=None, labels=None):
    shipped = [shipped_from_package(each) for each in folders]
    return write_repository(shipped, target, "net", allowed or Allowed(), labels)


def models(repository):
    return sorted(path.name for path in repository.iterdir())


CPU_ALONE = ["net_cpu", "net_cpu_jpeg", "net_cpu_preprocess"]
ALL = sorted([*CPU_ALONE, "net", "net_jpeg", "net_preprocess"])


def test_an_engine_of_tensorrt_that_was_run_is_in_the_repository(engine, tmp_path):
    folder = engine()
    assert written([folder], tmp_path / "models") == ("net", "net_cpu", "net_jpeg", "net_cpu_jpeg")
    assert models(tmp_path / "models") == ALL
    model = tmp_path / "models/net"
    assert (model / "1/model.plan").read_bytes() == (folder / "model.engine").read_bytes()
    config = config_from_text((model / "config.pbtxt").read_text())
    (agent,) = config.model_repository_agents.agents
    assert agent.parameters["MD5:1/model.plan"] == hashlib.md5((folder / "model.engine").read_bytes()).hexdigest()
    manifest_id = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    for name in ("net", "net_cpu"):
        read = config_from_text((tmp_path / "models" / name / "config.pbtxt").read_text())
        assert read.parameters["manifest_id"].string_value == manifest_id
        assert (tmp_path / "models" / name / "1/config.pbtxt").read_text() == (
            model.parent / name / "config.pbtxt"
        ).read_text()


@pytest.mark.parametrize("fields", [{"engine__executed": False}, {"engine__backend": "tensorrt_rtx"}])
def test_an_engine_that_cannot_be_served_is_left_out(engine, changed, tmp_path, fields):
    written([changed(engine(), **fields)], tmp_path / "models")
    assert models(tmp_path / "models") == CPU_ALONE


def test_an_engine_that_was_never_run_is_there_if_it_is_allowed(engine, changed, tmp_path):
    folder = changed(engine(), engine__executed=False)
    written([folder], tmp_path / "models", Allowed(unexecuted=True))
    assert models(tmp_path / "models") == ALL


def test_packages_of_several_gpus_are_one_model(engine, tmp_path):
    folders = [engine("SM80"), engine("SM120")]
    (folders[1] / "model.engine").write_bytes(b"of another GPU")
    manifest = json.loads((folders[1] / "manifest.json").read_text())
    manifest["files"]["model.engine"]["sha256"] = hashlib.sha256(b"of another GPU").hexdigest()
    (folders[1] / "manifest.json").write_text(json.dumps(manifest))
    written(folders, tmp_path / "models")
    config = config_from_text((tmp_path / "models/net/config.pbtxt").read_text())
    assert dict(config.cc_model_filenames) == {"8.0": "model_sm80.plan", "12.0": "model_sm120.plan"}
    assert (tmp_path / "models/net/1/model_sm120.plan").read_bytes() == b"of another GPU"
    (agent,) = config.model_repository_agents.agents
    assert agent.parameters["MD5:1/model_sm120.plan"] == hashlib.md5(b"of another GPU").hexdigest()


def test_packages_of_one_gpu_or_of_two_models_are_refused(engine, detector, tmp_path):
    with pytest.raises(UserError, match="several packages of 'test_vit' are for SM89"):
        written([engine(), engine()], tmp_path / "models")
    with pytest.raises(UserError, match="differ in model, tensors or preprocessing"):
        written([engine(), engine("SM80", detector)], tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_nothing_that_exists_is_replaced(package, tmp_path):
    written([package], tmp_path / "models")
    before = (tmp_path / "models/net_cpu/config.pbtxt").stat().st_ino
    with pytest.raises(UserError, match="exists already: expected a new folder"):
        written([package], tmp_path / "models")
    assert (tmp_path / "models/net_cpu/config.pbtxt").stat().st_ino == before
    (tmp_path / "empty").mkdir()
    written([package], tmp_path / "empty")
    assert models(tmp_path / "empty") == CPU_ALONE


def test_a_file_that_changes_while_it_is_written_leaves_nothing(package, changed, tmp_path):
    folder = changed(package)
    shipped = shipped_from_package(folder)
    (folder / "model.fp32.onnx").write_bytes(b"other")
    with pytest.raises(UserError, match=r"model.fp32.onnx' has changed since it was built"):
        write_repository([shipped], tmp_path / "models", "net", Allowed())
    assert not (tmp_path / "models").exists()
    assert not list(tmp_path.glob(".models*"))


def test_what_a_killed_run_left_is_no_part_of_the_next(package, tmp_path):
    (tmp_path / ".models.incoming/net_cpu/1").mkdir(parents=True)
    (tmp_path / ".models.incoming/other").mkdir()
    written([package], tmp_path / "models")
    assert models(tmp_path / "models") == CPU_ALONE
    assert not list(tmp_path.glob(".models*"))
    with (
        locked(tmp_path / ".again.lock"),
        pytest.raises(UserError, match=r"another run is writing '.*again'"),
    ):
        written([package], tmp_path / "again")


def test_a_place_that_cannot_be_written_is_named(package, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"repository '.*file/models' cannot be written \("):
        written([package], tmp_path / "file/models")


def test_labels_go_to_the_models_with_outputs(package, tmp_path):
    (tmp_path / "names").write_text("\n".join(map(str, range(1000))))
    written([package], tmp_path / "models", labels=tmp_path / "names")
    assert sorted(path.parent.name for path in (tmp_path / "models").rglob("labels.txt")) == ["net_cpu", "net_cpu_jpeg"]


@pytest.mark.parametrize("text", ["", "\n" * 1000, "only one", "\xff"])
def test_labels_that_do_not_fit_are_refused(package, tmp_path, text):
    (tmp_path / "names").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"labels '.*names' (has|cannot be read)"):
        written([package], tmp_path / "models", labels=tmp_path / "names")


def test_labels_of_a_network_without_classes_are_refused(detector, tmp_path):
    (tmp_path / "names").write_text("a\n" * 8)
    with pytest.raises(UserError, match="this network returns values"):
        written([detector], tmp_path / "models", labels=tmp_path / "names")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"boxes": None}, "'boxes' is NoneType and the task 'boxes'"),
        ({"task": "values"}, "'boxes' is dict and the task 'values'"),
        ({"image": [48, 32]}, r"'boxes' has the image \(48, 32\), expected \(32, 48\) as the input"),
        ({"form": "bins", "strides": 8}, "image and strides are not whole numbers"),
        ({"form": "deltas", "strides": None}, "image and strides are not whole numbers"),
        ({"classes": 4}, "its outputs should be scores"),
    ],
)
def test_boxes_that_do_not_fit_the_package_are_refused(boxed, tmp_path, change, text):
    manifest = json.loads((boxed / MANIFEST).read_text())
    for key, value in change.items():
        (manifest if key in manifest else manifest["boxes"])[key] = value
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=text):
        shipped_from_package(tmp_path)
