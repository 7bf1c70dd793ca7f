"""Each reason not to serve a package is told in one line, and none is told without reason."""

import json
from dataclasses import replace

import pytest

from deploy.engine.architectures import RTX_DEFAULT
from deploy.serve.preflight import (
    HEADER_FAULTS,
    MB,
    Allowed,
    Machine,
    disk_faults,
    header_faults,
    machine_faults,
    preflight,
    promise_faults,
    rtx_diagnostics,
    this_machine,
)
from tests.unit.deploy.serve.test_shipped import read

GPU = Machine(sm=89, driver="580.95.05", gpu_mb=8000, free_disk=10**9, tensorrt="10.14.1.48")


@pytest.fixture
def shipped(tmp_path):
    """A package that may be served on GPU: real weights, own images, an engine that was run."""
    return replace(read(tmp_path), executed=True, sample=False, engine_bytes=100 * MB)


def only(faults, said):
    (fault,) = faults
    assert said in fault
    assert "\n" not in fault


def test_a_good_package_on_a_fitting_machine_has_no_fault(shipped):
    assert promise_faults(shipped, Allowed(), cpu=False) == []
    assert machine_faults(shipped, GPU) == []
    assert disk_faults(shipped, GPU) == []


PROMISES = {
    "random_weights": ({"random": True}, "its weights are random"),
    "sample_calibration": ({"sample": True}, "calibrated on the built-in sample images"),
    "unexecuted": ({"executed": False}, "model.engine was never run"),
}


@pytest.mark.parametrize("allowance", PROMISES)
def test_what_must_not_be_served_is_refused_unless_it_is_allowed(shipped, allowance):
    fields, said = PROMISES[allowance]
    only(promise_faults(replace(shipped, **fields), Allowed(), cpu=False), said)
    assert promise_faults(replace(shipped, **fields), Allowed(**{allowance: True}), cpu=False) == []


def test_the_graph_alone_needs_no_engine_that_was_run(shipped):
    assert promise_faults(replace(shipped, executed=False), Allowed(), cpu=True) == []
    assert promise_faults(replace(shipped, executed=False, random=True), Allowed(), cpu=True) != []


MACHINES = {
    "no driver": ({"sm": None, "driver": None, "gpu_mb": None}, {}, "no usable NVIDIA GPU here"),
    "another GPU": ({"sm": 80}, {}, "model.engine is for SM89, this GPU is SM80"),
    "another TensorRT": (
        {"tensorrt": "11.4.0.106"},
        {},
        "was built by TensorRT 10.14.1.48, the server holds 11.4.0.106",
    ),
    "an engine of TensorRT-RTX": ({}, {"backend": "tensorrt_rtx"}, "which alone Triton loads"),
    "an older driver": ({"driver": "570.124.06"}, {}, "driver 570.124.06 is older than 580.95.05"),
    "a small GPU": ({"gpu_mb": 99}, {}, "the GPU has 99 MB, model.engine alone has 100 MB"),
}


@pytest.mark.parametrize("case", MACHINES)
def test_what_the_machine_lacks_is_named(shipped, case):
    machine, package, said = MACHINES[case]
    only(machine_faults(replace(shipped, **package), replace(GPU, **machine)), said)


def test_versions_are_compared_as_numbers(shipped):
    assert machine_faults(replace(shipped, driver="580.9.1"), GPU) == []
    assert machine_faults(shipped, replace(GPU, driver="1000.1")) == []


def test_no_container_is_asked_about_an_engine_of_rtx_unless_it_is_named(shipped):
    assert machine_faults(replace(shipped, backend="tensorrt_rtx"), replace(GPU, tensorrt=None)) == []


def test_an_engine_for_cpus_needs_no_gpu(shipped):
    for_cpu = replace(shipped, backend="onnxruntime", targets=("CPU x86_64",))
    bare = replace(GPU, sm=None, driver=None, gpu_mb=None, tensorrt=None)
    assert machine_faults(for_cpu, bare) == []
    only(machine_faults(for_cpu, replace(bare, tensorrt="10.14.1.48")), "is of onnxruntime: expected tensorrt")


def test_tensorrt_rtx_is_not_served_on_hopper(shipped):
    rtx = replace(shipped, backend="tensorrt_rtx", targets=RTX_DEFAULT)
    hopper = replace(GPU, sm=90, tensorrt=None)
    only(machine_faults(rtx, hopper), "SM90: build it here (python -m deploy rebuild --target tensorrt)")
    only(machine_faults(rtx, replace(hopper, sm=75)), "build it for SM=75 (python -m deploy rebuild)")
    assert not any(
        "SM" in fault for sm in (80, 86, 89, 120, 121, 130) for fault in machine_faults(rtx, replace(hopper, sm=sm))
    )


def test_a_full_disk_is_named(shipped):
    only(disk_faults(replace(shipped, bytes=3 * MB), replace(GPU, free_disk=2 * MB)), "the package has 3 MB")


def test_every_bit_of_a_header_has_its_sentence():
    only(header_faults(32), "is no engine of TensorRT-RTX, or a damaged one (its header says so)")
    assert len(header_faults(1 | 4 | 16)) == 3
    assert header_faults(0) == []
    trt = pytest.importorskip("tensorrt_rtx")
    bits = {int(each) for each in trt.EngineInvalidityDiagnostics.__members__.values()}
    assert bits - HEADER_FAULTS.keys() == {int(trt.EngineInvalidityDiagnostics.CUDA_ERROR)}


def test_garbage_for_an_engine_shows_in_its_header(capfd):
    pytest.importorskip("tensorrt_rtx")
    assert rtx_diagnostics(b"no engine at all" * 100) == 32
    assert capfd.readouterr() == ("", "")


def test_files_are_compared_with_the_manifest(tmp_path):
    read(tmp_path)
    wrong = preflight(tmp_path, replace(GPU, free_disk=10**12), Allowed(sample_calibration=True), cpu=True)
    assert "model.engine is missing" in wrong
    assert "golden.npz is not recorded in manifest.json: not shown to be part of the package" in wrong
    (tmp_path / "surplus").write_text("")
    again = preflight(tmp_path, GPU, Allowed(sample_calibration=True), cpu=True)
    assert {*again} - {*wrong} == {"surplus is not recorded in manifest.json: not shown to be part of the package"}


def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path):
    from calib.errors import UserError

    read(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["files"]["../../etc/passwd"] = {"sha256": "0" * 64, "bytes": 1}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="expected names without folders"):
        preflight(tmp_path, GPU, Allowed(), cpu=True)


def test_this_machine_is_looked_at(tmp_path):
    found = this_machine(tmp_path / "not/yet/there", "10.14.1")
    assert found.free_disk > 0
    assert found.tensorrt == "10.14.1"
