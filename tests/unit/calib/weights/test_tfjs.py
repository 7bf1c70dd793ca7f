"""TensorFlow.js files are read as their manifest says, and refused where it does not fit."""

import json

import numpy as np
import pytest
import torch

from calib.weights.tfjs import convolutions_from_tfjs, tensors_from_tfjs

WEIGHTS = np.float32([[0.5, -1.0, 2.0], [0.25, 8.0, -0.125]])  # exact in 16 bits
STEPS = np.uint8([0, 3, 255])


def model(*groups):
    return json.dumps({"weightsManifest": [{"paths": paths, "weights": entries} for paths, entries in groups]}).encode()


def entry(name, shape, dtype="float32", **others):
    return {"name": name, "shape": shape, "dtype": dtype, **others}


FIRST = (["a.bin", "b.bin"], [entry("plain", [2, 3]), entry("axis", [], "int32")])
HALF = {"dtype": "float16", "original_dtype": "float32"}
SECOND = (
    ["c.bin"],
    [
        entry("half", [2, 3], quantization=HALF),
        entry("steps", [3], quantization={"dtype": "uint8", "scale": 0.5, "min": -1}),
    ],
)
CONTENT = WEIGHTS.tobytes() + np.int32(-7).tobytes()
SHARDS = (CONTENT[:10], CONTENT[10:], WEIGHTS.astype("<f2").tobytes() + STEPS.tobytes())


def test_what_was_written_is_read_across_shards_and_groups():
    found = tensors_from_tfjs(model(FIRST, SECOND), *SHARDS)
    assert list(found) == ["plain", "axis", "half", "steps"]
    np.testing.assert_array_equal(found["plain"], WEIGHTS)
    np.testing.assert_array_equal(found["half"], WEIGHTS)
    np.testing.assert_array_equal(found["steps"], [-1.0, 0.5, 126.5])
    assert found["axis"] == -7
    assert {name: value.dtype for name, value in found.items()} == {
        "plain": np.float32, "axis": np.int32, "half": np.float32, "steps": np.float32,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("shards", "told"),
    [
        (SHARDS[:2], "names 3 shards, 2 were given"),
        ((*SHARDS[:2], SHARDS[2][:-1]), "'steps' ends at byte 15, but its shards have 14 bytes together"),
        ((*SHARDS[:2], SHARDS[2] + b"x"), r"the shards c\.bin have 16 bytes, 15 were expected"),
    ],
    ids=["one missing", "short", "long"],
)
def test_shards_of_another_size_are_refused(shards, told):
    with pytest.raises(ValueError, match=told):
        tensors_from_tfjs(model(FIRST, SECOND), *shards)


def test_an_unknown_type_is_refused_by_name():
    with pytest.raises(ValueError, match="'words' has the type string: expected one of float32"):
        tensors_from_tfjs(model((["a.bin"], [entry("words", [1], "string")])), b"")


def test_convolutions_compute_what_the_kernels_of_tensorflow_do():
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(3, 2, 4, 5)).astype("f4"), rng.normal(size=5).astype("f4")
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 5, (3, 2)))
    net.load_state_dict(convolutions_from_tfjs(net, [(kernel, bias)]))
    x = rng.normal(size=(3, 2, 4)).astype("f4")  # one window, channels last as in TensorFlow
    with torch.no_grad():
        y = net(torch.from_numpy(x).permute(2, 0, 1)[None]).flatten()
    np.testing.assert_allclose(y, np.einsum("hwi,hwio->o", x, kernel) + bias, rtol=1e-5)


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        (
            [(np.zeros((1, 1, 4, 3), "f4"), np.zeros(3, "f4"))],
            r"weight of '0' is \(3, 4, 1, 1\), expected \(4, 3, 1, 1\)",
        ),
        ([(np.zeros((1, 1, 3, 4), "f4"), np.zeros(3, "f4"))], r"bias of '0' is \(3,\), expected \(4,\)"),
        ([], "shorter|longer"),
    ],
    ids=["kernel", "bias", "count"],
)
def test_convolutions_of_another_shape_are_refused(layers, told):
    with pytest.raises(ValueError, match=told):
        convolutions_from_tfjs(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1)), layers)
