"""The engine of a package runs by its folder alone, and a folder that has none is one line."""

import numpy as np
import pytest

from calib.errors import UserError
from deploy.engine.backends import tensorrt
from deploy.engine.build import Profile
from deploy.engine.packaged import runner_of_package
from deploy.gpu import why_no_gpu
from deploy.package import write_json
from tests.gpu.host import gpu_host
from tests.unit.deploy.engine.test_runner import given, graph


def test_the_engine_of_a_package_runs(tmp_path, monkeypatch, api_of):
    gpu_host(monkeypatch, api_of("11.4"))
    (tmp_path / "model.engine").write_bytes(tensorrt.build(graph(), Profile(2, 4), None).plan)
    write_json(tmp_path / "manifest.json", {"engine": {"backend": "tensorrt"}})
    asked = given(5)
    with runner_of_package(tmp_path) as run:
        np.testing.assert_array_equal(run(asked)["negative"], -asked["x"])


MANIFESTS = {
    "unknown": (
        {"engine": {"backend": "openvino"}},
        "names the backend 'openvino': expected one of onnxruntime, tensorrt, tensorrt_rtx",
    ),
    "none": ({}, "names the backend None"),
    "text": ({"engine": "tensorrt"}, "names the backend None"),
    "no engine": ({"engine": {"backend": "tensorrt"}}, r"model.engine' cannot be read \(No such file or directory\)"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_folder_without_an_engine_is_one_line(tmp_path, monkeypatch, api_of, case):
    gpu_host(monkeypatch, api_of("11.4"))
    content, text = MANIFESTS[case]
    write_json(tmp_path / "manifest.json", content)
    with pytest.raises(UserError, match=text) as caught:
        runner_of_package(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(why_no_gpu() is None, reason="there is a GPU")
def test_where_no_engine_can_run_the_reason_is_said(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    write_json(tmp_path / "manifest.json", {"engine": {"backend": "tensorrt_rtx"}})
    with pytest.raises(UserError, match=r"cannot run here: tensorrt_rtx: no NVIDIA driver$"):
        runner_of_package(tmp_path)
