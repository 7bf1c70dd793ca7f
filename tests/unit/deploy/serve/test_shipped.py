"""A manifest of any origin: what `make engine` writes is read, everything else is refused in one line."""

import copy
import json

import pytest

from calib.errors import UserError
from deploy.serve.shipped import ServedTensor, served_name, shipped_from_package

SHAPES = {"min": [1, 3, 32, 48], "opt": [8, 3, 32, 48], "max": [32, 3, 32, 48]}
MANIFEST = {
    "model": "vit_b",
    "task": "classifier",
    "files": {"model.engine": {"sha256": "0" * 64, "bytes": 70}, "model.onnx": {"sha256": "1" * 64, "bytes": 30}},
    "weights": {"random": False},
    "calibration": {"sample": True},
    "preprocessing": {
        "height": 32, "width": 48, "resize_height": 36, "resize_width": 54, "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "crop_mode": "center",
    },
    "engine": {"backend": "tensorrt", "version": "10.14.1.48", "targets": ["SM89"]},
    "io": {
        "inputs": [{"name": "input", "dtype": "float16", **SHAPES}],
        "outputs": [{"name": "output", "dtype": "float16", "min": [1, 10], "opt": [8, 10], "max": [32, 10]}],
    },
    "host": {"driver": "580.95.05"},
}  # fmt: skip


def read(folder, change=lambda _: None):
    manifest = copy.deepcopy(MANIFEST)
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return shipped_from_package(folder)


def test_a_manifest_is_read(tmp_path):
    found = read(tmp_path)
    assert found.inputs == (ServedTensor("input", "float16", (3, 32, 48)),)
    assert found.outputs == (ServedTensor("output", "float16", (10,)),)
    assert (found.opt, found.largest, found.engine_bytes, found.bytes) == (8, 32, 70, 100)
    assert (found.sample, found.random, found.driver) == (True, False, "580.95.05")
    assert len(found.id) == 64


IDS = {"name": "ids", "dtype": "int64", "min": [1, 12], "opt": [8, 12], "max": [32, 12]}
TIME = {"name": "t", "dtype": "float16", "min": [1], "opt": [8], "max": [32]}


def named(*inputs):
    """A change to the manifest of a network with these inputs."""
    return lambda manifest: manifest.update(preprocessing=None, io={**manifest["io"], "inputs": [*inputs]})


def test_a_manifest_with_named_inputs_is_read(tmp_path):
    found = read(tmp_path, named(IDS, TIME))
    assert found.inputs == (ServedTensor("ids", "int64", (12,)), ServedTensor("t", "float16", ()))
    assert found.preprocessing is None


def executed(value):
    return lambda manifest: manifest["engine"].update(executed=value)


@pytest.mark.parametrize("value", [False, 1, "true", None])
def test_an_engine_counts_as_run_only_where_the_manifest_says_true(tmp_path, value):
    assert not read(tmp_path).executed
    assert not read(tmp_path, executed(value)).executed
    assert read(tmp_path, executed(True)).executed


def at(path, value):
    """A change of the field `path` to `value`."""

    def change(manifest):
        *tables, last = path
        for each in tables:
            manifest = manifest[each]
        manifest[last] = value

    return change


HOSTILE = {
    "no model": at(["model"], None),
    "line break in a name": at(["model"], "a\nb"),
    "table for a name": at(["model"], {}),
    "number for a truth": at(["weights", "random"], 0),
    "no calibration": at(["calibration"], []),
    "no tensors": at(["io", "inputs"], []),
    "tensor that is none": at(["io", "outputs", 0], "output"),
    "name with a space": at(["io", "outputs", 0, "name"], "a b"),
    "other type": at(["io", "inputs", 0, "dtype"], "int8"),
    "two of one name": lambda manifest: manifest["io"]["outputs"].append(manifest["io"]["outputs"][0]),
    "negative axis": at(["io", "outputs", 0, "max"], [32, -1]),
    "truth for an axis": at(["io", "outputs", 0, "min"], [True, 10]),
    "huge axis": at(["io", "outputs", 0, "max"], [32, 10**12]),
    "shapes that differ": at(["io", "outputs", 0, "max"], [32, 11]),
    "least batch of two": at(["io", "outputs", 0, "min"], [2, 10]),
    "usual batch above the largest": at(["io", "outputs", 0, "opt"], [64, 10]),
    "outputs of other batches": lambda manifest: manifest["io"]["outputs"][0].update(opt=[4, 10]),
    "image of another size": at(["preprocessing", "height"], 33),
    "huge image": at(["preprocessing", "resize_height"], 10**9),
    "division by zero": at(["preprocessing", "std"], [0.2, 0, 0.2]),
    "two channels": at(["preprocessing", "mean"], [0.5, 0.5]),
    "unknown filter": at(["preprocessing", "interpolation"], "magic"),
    "list for a filter": at(["preprocessing", "interpolation"], []),
    "unknown field": at(["preprocessing", "gamma"], 1),
    "path for a GPU": at(["engine", "targets"], ["../SM89"]),
    "no GPU": at(["engine", "targets"], []),
    "text for a version": at(["engine", "version"], "newest"),
    "truth for bytes": at(["files", "model.engine", "bytes"], True),
    "text for bytes": at(["files", "model.engine", "bytes"], "70"),
    "no engine among the files": at(["files"], {"model.onnx": {"sha256": "1" * 64, "bytes": 30}}),
    "ids in the place of an image": at(["io", "inputs", 0], IDS),
    "named inputs of another type": named({**IDS, "dtype": "uint8"}),
    "named inputs of other batches": named(IDS, {**TIME, "opt": [4]}),
    "no preprocessing and nothing said of it": lambda manifest: manifest.pop("preprocessing"),
    "number for a driver": at(["host", "driver"], 580),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_anything_else_is_refused_in_one_line(tmp_path, case):
    with pytest.raises(UserError) as refused:
        read(tmp_path, HOSTILE[case])
    assert "\n" not in str(refused.value)
    assert "expected" in str(refused.value)


def test_a_folder_without_a_manifest_is_no_package(tmp_path):
    with pytest.raises(UserError, match="no package at"):
        shipped_from_package(tmp_path)


def test_names_of_served_models(tmp_path):
    assert served_name(read(tmp_path, at(["model"], "timm/vit"))) == "timm_vit"
    assert served_name(read(tmp_path), "mine") == "mine"
    for name in ("../mine", ".mine", "my model", "m" * 200):
        with pytest.raises(UserError, match="is no name of a served model"):
            served_name(read(tmp_path), name)
