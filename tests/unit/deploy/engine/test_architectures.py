"""TensorRT-RTX is said not to run on the GPUs that it refuses, and on no others."""

from types import SimpleNamespace

import pytest

from deploy.engine import architectures
from deploy.engine.architectures import RTX_DEFAULT, RTX_SMS, runs_on, why_not_rtx
from deploy.engine.backends import tensorrt_rtx
from deploy.engine.load import why_invalid
from deploy.gpu import Gpu, NoGpuError

HOPPER = Gpu("NVIDIA H100 80GB HBM3", 90, 80 << 30, "13.0", "580.159")


@pytest.mark.parametrize(
    ("target", "sm", "expected"),
    [("SM89", 89, True), ("SM89", 90, False), ("SM120+", 90, False), ("SM120+", 120, True), ("SM120+", 130, True)],
)
def test_a_target_with_a_plus_takes_later_gpus(target, sm, expected):
    assert runs_on(target, sm) is expected


def test_targets_are_those_that_the_library_knows():
    trt = pytest.importorskip("tensorrt_rtx")
    assert {f"SM{sm}" for sm in RTX_SMS} == {
        name for name in trt.ComputeCapability.__members__ if name.startswith("SM")
    }
    assert all(any(runs_on(target, sm) for target in RTX_DEFAULT) for sm in RTX_SMS if sm >= 80)


@pytest.mark.parametrize("sm", [87, 90, 100, 103, 110])
def test_a_gpu_that_is_refused_is_named_before_and_after(sm, monkeypatch):
    here = Gpu(HOPPER.name, sm, HOPPER.memory, HOPPER.cuda, HOPPER.driver)
    monkeypatch.setattr(architectures, "gpu", lambda: here)
    monkeypatch.setattr(tensorrt_rtx, "cannot_build", lambda: None)
    monkeypatch.setattr(tensorrt_rtx, "why_no_gpu", lambda: None)
    said = tensorrt_rtx.cannot_run()
    assert f"does not support the {HOPPER.name}, compute capability {sm / 10:.1f}" in said
    assert said.endswith("build with TARGET=tensorrt")
    bits = SimpleNamespace(**dict.fromkeys(("VERSION_MISMATCH", "MALFORMED_ENGINE"), 0), UNSUPPORTED_CC=2)
    trt = SimpleNamespace(EngineValidity=SimpleNamespace(INVALID=1), EngineInvalidityDiagnostics=bits)
    assert why_invalid(trt, SimpleNamespace(get_engine_validity=lambda _plan: (1, 2)), b"") == said


@pytest.mark.parametrize("sm", [*RTX_SMS, 130])
def test_others_are_not_refused(sm, monkeypatch):
    monkeypatch.setattr(architectures, "gpu", lambda: Gpu("One", sm, 1, "13.0", None))
    assert why_not_rtx() is None


def test_a_machine_without_a_gpu_is_another_reason(monkeypatch):
    def none():
        raise NoGpuError("no NVIDIA driver")

    monkeypatch.setattr(architectures, "gpu", none)
    assert why_not_rtx() is None
