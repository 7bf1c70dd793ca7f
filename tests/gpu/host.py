"""Makes a machine look like a GPU host with TensorRT, in this process."""

import sys

import deploy.engine.runner
import deploy.kept_engines
import deploy.serve.rebuild
import deploy.steps  # before the stand-in, which is no package that libraries can look for
from deploy.engine.backends import tensorrt
from deploy.gpu import Gpu
from tests.gpu.fake_trt import FakeTensorRT
from tests.gpu.host_device import HostDevice

HERE = Gpu("Made-up GPU", 89, 24 << 30, "13.0", "580.82")


def gpu_host(monkeypatch, api, **broken):
    """A stand-in for the package tensorrt, over the bindings `api`; what is `broken` goes wrong in it."""
    trt = FakeTensorRT(api, None, broken)

    def device():
        trt.device = HostDevice()
        return trt.device

    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(tensorrt, "gpu", lambda: HERE)
    monkeypatch.setattr(tensorrt, "why_no_gpu", lambda: None)
    monkeypatch.setattr(tensorrt, "timings_file", lambda *_: None)  # nothing goes into the user's cache
    monkeypatch.setattr(tensorrt, "why_not_loaded", lambda *_: None)
    monkeypatch.setattr(deploy.engine.runner, "open_device", device)
    # in this process, where the stand-in is
    for module in (deploy.kept_engines, deploy.serve.rebuild):
        monkeypatch.setattr(module, "build_apart", lambda backend, *arguments: backend.build(*arguments))
    return trt
