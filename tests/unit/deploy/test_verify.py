"""What a package of FP16 types has to reach."""

import numpy as np
import onnx
import pytest

from calib.errors import UserError
from calib.store.digests import file_sha256
from deploy.measure.accuracy import Fidelity
from deploy.measure.ort_options import saturates
from deploy.package import FILES, GOLDEN, MANIFEST, MODEL_FP32, write_json
from deploy.verify import (
    FP16_NOISE_DB,
    MAX_DRIFT_DB,
    MAX_FP16_LOSS_DB,
    CpuSpeed,
    Verdict,
    broken_limits,
    cpu_speed,
    golden_arrays,
    least_fp16_db,
    require_package,
    timed_samples,
    verify_package,
)
from tests.unit.deploy.graph.test_integer_kernels import QUANTIZED, SAME, convolution, images


@pytest.mark.parametrize("db", [5.0, 16.0, 25.0])
def test_beside_much_int8_noise_fp16_may_cost_what_flips_do(db):
    assert least_fp16_db(db) == pytest.approx(db - MAX_FP16_LOSS_DB)


@pytest.mark.parametrize("db", [34.0, 36.0, 60.0, float("inf")])
def test_beside_little_int8_noise_fp16_may_add_its_own(db):
    signal, generator = 1.0, np.random.default_rng(0)
    noise = generator.normal(0, 10 ** (-db / 20), 1_000_000) + generator.normal(
        0, 10 ** (-FP16_NOISE_DB / 20), 1_000_000
    )
    assert least_fp16_db(db) == pytest.approx(10 * np.log10(signal / np.square(noise).mean()), abs=0.02)


@pytest.mark.parametrize("overflown", [float("nan"), float("-inf"), 12.0])
def test_overflow_is_a_failure_and_a_perfect_graph_is_none(overflown):
    def verdict(fp32, fp16):
        return Verdict(fidelity=None, fp32_sqnr_db=fp32, fp16_sqnr_db=fp16)

    assert "overflow FP16" in verdict(30.0, overflown).failure()
    assert verdict(30.0, 29.0).failure() is None
    assert verdict(30.0, 31.0).failure() is None
    assert verdict(float("inf"), float("inf")).failure() is None


def write_package(folder, golden=None):
    """A folder with all files of a package and digests that fit; returns the table of files in its manifest."""
    for name in FILES:
        (folder / name).write_bytes(b"x")
    if golden is not None:
        np.savez(folder / GOLDEN, **golden)
    files = {name: {"sha256": file_sha256(folder / name)} for name in FILES if name != MANIFEST}
    write_json(folder / MANIFEST, {"files": files})
    return files


GOOD = "0" * 64
MANIFESTS = {
    "no table": ({}, "has no table 'files'"),
    "list": ({"files": []}, "has no table 'files'"),
    "out of the folder": ({"files": {"../../etc/passwd": {"sha256": GOOD}}}, "lists the file '../../etc/passwd'"),
    "absolute": ({"files": {"/etc/passwd": {"sha256": GOOD}}}, "lists the file '/etc/passwd'"),
    "backslash": ({"files": {"..\\x": {"sha256": GOOD}}}, "lists the file"),
    "line break": ({"files": {"a\nb": {"sha256": GOOD}}}, "lists the file"),
    "parent": ({"files": {"..": {"sha256": GOOD}}}, "lists the file"),
    "no digest": ({"files": {"model.onnx": {}}}, "records no sha256 of 'model.onnx'"),
    "no record": ({"files": {"model.onnx": GOOD}}, "records no sha256 of 'model.onnx'"),
    "digest no text": ({"files": {"model.onnx": {"sha256": 3}}}, "records no sha256 of 'model.onnx'"),
    "short digest": ({"files": {"model.onnx": {"sha256": "ab"}}}, "records no sha256 of 'model.onnx'"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_is_none_of_a_package_is_refused_in_one_line(tmp_path, case):
    content, expected = MANIFESTS[case]
    write_package(tmp_path)
    write_json(tmp_path / MANIFEST, content)
    with pytest.raises(UserError) as caught:
        verify_package(tmp_path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "3", "null", "{"])
def test_a_manifest_that_is_no_object_is_refused(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=MANIFEST):
        verify_package(tmp_path)


def test_missing_and_changed_files_are_named(tmp_path):
    write_package(tmp_path)
    (tmp_path / GOLDEN).unlink()
    (tmp_path / "model.onnx").write_text("other")
    assert verify_package(tmp_path) == [
        "model.onnx has changed since it was built (sha256 differs)",
        "golden.npz is missing",
    ]


IMAGES, OUTPUT = np.zeros((2, 3, 4, 4), np.float32), np.zeros((2, 5), np.float32)
GOLDENS = {
    "no archive": None,
    "an array missing": {"images": IMAGES, "float_output": OUTPUT},
    "other counts": {"images": IMAGES[:1], "float_output": OUTPUT, "simulated_output": OUTPUT},
    "other sizes": {"images": IMAGES, "float_output": OUTPUT, "simulated_output": OUTPUT[:, :3]},
    "no images": {"images": IMAGES[:0], "float_output": OUTPUT[:0], "simulated_output": OUTPUT[:0]},
    "integers": {"images": IMAGES.astype(int), "float_output": OUTPUT, "simulated_output": OUTPUT},
    "scalars": {"images": IMAGES, "float_output": np.float32(0), "simulated_output": np.float32(0)},
    "no outputs": {"images": IMAGES},
    "named inputs of other counts": {
        "input_a": IMAGES,
        "input_b": IMAGES[:1],
        "float_o": OUTPUT,
        "simulated_o": OUTPUT,
    },
    "a named input without samples": {"input_a": np.int64(1), "float_output": OUTPUT, "simulated_output": OUTPUT},
    "named inputs of texts": {"input_a": np.array(["a", "b"]), "float_output": OUTPUT, "simulated_output": OUTPUT},
    "other names": {"images": IMAGES, "float_boxes": OUTPUT, "simulated_scores": OUTPUT},
    "objects": {"images": np.array([{}], object), "float_output": OUTPUT, "simulated_output": OUTPUT},
}


@pytest.mark.parametrize("case", GOLDENS)
def test_golden_arrays_that_are_none_are_refused_in_one_line(tmp_path, case):
    write_package(tmp_path, GOLDENS[case])
    with pytest.raises(UserError, match=GOLDEN) as caught:
        verify_package(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_graph_that_cannot_be_run_is_refused_in_one_line(tmp_path):
    write_package(tmp_path, {"images": IMAGES, "float_output": OUTPUT, "simulated_output": OUTPUT})
    with pytest.raises(UserError, match=r"model.fp32.onnx in .* cannot be run on the golden images") as caught:
        verify_package(tmp_path)
    assert "\n" not in str(caught.value)


def test_limits_that_were_not_kept_are_told(tmp_path):
    write_package(tmp_path)
    assert broken_limits(tmp_path) == []
    kept, broken = ({"limit": "MAX_DROP=1%", "kept": kept, "measured": "2 %"} for kept in (True, False))
    write_json(tmp_path / MANIFEST, {"acceptance": {"checks": [kept, broken]}})
    assert broken_limits(tmp_path) == ["MAX_DROP=1%: 2 %"]
    write_json(tmp_path / MANIFEST, {"acceptance": {"checks": [1]}})
    assert broken_limits(tmp_path) == []


def test_a_package_that_did_not_keep_its_limits_is_named_where_the_other_is_missing(tmp_path):
    with pytest.raises(UserError) as caught:
        require_package(tmp_path / "int8")
    assert "not-accepted" not in str(caught.value)
    (tmp_path / "int8.not-accepted").mkdir()
    (tmp_path / "int8.not-accepted" / MANIFEST).write_text("{}")
    with pytest.raises(UserError, match=r"one that did not keep its limits is in '.*int8.not-accepted'"):
        require_package(tmp_path / "int8")


def test_named_inputs_are_read_with_their_types(tmp_path):
    ids, kept = np.arange(2), np.zeros((2, 3), bool)
    np.savez(tmp_path / GOLDEN, input_ids=ids, input_kept=kept, float_output=OUTPUT, simulated_output=OUTPUT)
    given, reference, _ = golden_arrays(tmp_path / GOLDEN)
    assert {name: (array.dtype, array.shape) for name, array in given.items()} == {
        "ids": (ids.dtype, (2,)), "kept": (kept.dtype, (2, 3))
    }  # fmt: skip
    assert list(reference) == ["output"]


@pytest.mark.parametrize(
    ("sqnr_db", "agreement", "text"),
    [
        (30.0, 0.9, None),
        (9.0, 0.9, "9.0 dB SQNR"),
        (30.0, 0.3, "agrees with the float network on 30% of the images"),
        (float("nan"), 0.9, "nan dB SQNR"),
        (30.0, float("nan"), "agrees with the float network on nan%"),
    ],
)
def test_a_result_that_is_no_longer_the_network_is_said_with_its_causes(sqnr_db, agreement, text):
    found = Verdict(Fidelity(8, sqnr_db, 1.0, top1_agreement=agreement), 30.0, 30.0).no_longer_the_network()
    assert found is None if text is None else text in found


@pytest.mark.parametrize("name", [name for name in FILES if name != MANIFEST])
def test_a_file_that_is_not_recorded_is_named(tmp_path, name):
    files = write_package(tmp_path)
    del files[name]
    write_json(tmp_path / MANIFEST, {"files": files})
    assert verify_package(tmp_path) == [f"{name} is not recorded in {MANIFEST}: not shown to be part of the package"]


def test_a_file_beside_the_package_is_named_and_a_hidden_one_is_not(tmp_path):
    write_package(tmp_path)
    (tmp_path / "other.engine").write_text("x")
    (tmp_path / ".DS_Store").write_text("x")
    assert [line.split()[0] for line in verify_package(tmp_path)] == ["other.engine"]


def test_the_graph_with_integer_kernels_is_timed_and_compared_with_the_one_that_ships(tmp_path):
    onnx.save(convolution(f"c = Conv{SAME}(dq, W, b)  z = Relu(c)  {QUANTIZED}"), tmp_path / MODEL_FP32)
    onnx.save(convolution(f"c = Conv{SAME}(x, W, b)  y = Relu(c)"), tmp_path / "float.onnx")
    found = cpu_speed(tmp_path, tmp_path / "float.onnx", images())
    assert found.written == ({} if saturates() else {"QLinearConv": 1})
    assert found.integer_layers == len(found.written)
    assert found.sqnr_db == pytest.approx(found.plain_sqnr_db, abs=0.1)
    assert found.plain_sqnr_db > 15
    assert found.warnings() == []


@pytest.mark.parametrize(("seconds", "samples"), [(0.1, 8), (5.0, 8), (10.0, 4), (39.0, 1), (500.0, 1)])
def test_a_batch_that_takes_long_is_timed_in_part(seconds, samples):
    assert timed_samples(8, seconds) == samples


@pytest.mark.parametrize("loss", [0.5 * MAX_DRIFT_DB, 1.5 * MAX_DRIFT_DB, float("nan")])
def test_integer_kernels_that_compute_something_else_are_told(loss):
    found = CpuSpeed(None, 8, 1, {"QLinearConv": 1}, sqnr_db=20.0 - loss, plain_sqnr_db=20.0).warnings()
    assert len(found) == (not loss <= MAX_DRIFT_DB)
    assert all("without them 20.0 dB" in line for line in found)
