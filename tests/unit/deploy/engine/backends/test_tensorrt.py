"""The backend TensorRT builds strongly typed engines through the real bindings, and they give what the graph computes."""

import functools
from unittest.mock import Mock

import numpy as np
import pytest

from calib.errors import UserError
from calib.network.qdq import quantized_net
from deploy.bridge.export import export_pair
from deploy.engine import timing_cache
from deploy.engine.audit import audit, planned_layers
from deploy.engine.backends import tensorrt
from deploy.engine.build import Profile
from deploy.engine.runner import EngineRunner
from deploy.measure.onnx_runner import OnnxRunner
from tests.gpu.bindings import WHEELS
from tests.gpu.host import gpu_host
from tests.tiny import SIZE, calibrated, rounded, tiny_batches, tiny_halves


def exported():
    """model.onnx of a tiny network."""
    halves = tiny_halves(2)
    return export_pair(quantized_net(rounded(calibrated("vit", halves), halves)), (SIZE, SIZE))[0]


@pytest.fixture(scope="module")
def graph():
    return exported()


@pytest.fixture
def keeping(tmp_path, monkeypatch, installed):
    """As `installed`, with an empty cache of the user; returns (what installs, the folder of the cache)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def install(api, **broken):
        trt = installed(api, **broken)
        monkeypatch.setattr(tensorrt, "timings_file", timing_cache.timings_file)
        return trt

    return install, tmp_path / "cache"


@pytest.fixture
def installed(monkeypatch):
    """What makes a stand-in the package tensorrt of a machine with a GPU."""
    return functools.partial(gpu_host, monkeypatch)


@pytest.mark.parametrize("version", WHEELS)
def test_an_engine_is_strongly_typed_proven_and_computes_what_its_graph_does(api_of, installed, graph, version):
    trt = installed(api_of(version))
    assert tensorrt.cannot_build() is None
    built = tensorrt.build(graph, Profile(2, 3), None)
    assert trt.flags == (1 << trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED if version.startswith("10") else 0)
    assert (built.targets, built.version, built.notes) == (("SM89",), trt.__version__, ("a warning",))
    assert len(built.layers["inspector"]["Layers"]) == len(built.kernels)
    proved = audit(built.kernels, planned_layers(graph))
    assert not proved.lost
    assert proved.planned == proved.int8_gemms > 0
    images = np.concatenate([batch.numpy() for batch in tiny_batches(2)]).astype(np.float16)
    with EngineRunner(built.plan, trt) as run:
        found = run({"input": images})
    for name, expected in OnnxRunner(graph.SerializeToString(), fused=False).named_outputs(images).items():
        # batches of other sizes than the oracle's: sums in FP16 may be added in another order
        np.testing.assert_allclose(found[name].astype(np.float32), expected.astype(np.float32), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        ({"parse": "unsupported\n operator"}, "rejects node 'a/Conv': unsupported operator"),
        ({"parse": "Plugin not found, are"}, "rejects node 'a/Conv': it has no operator Conv; compute that part"),
        ({"build": "no implementation\nfor node"}, "could not build the engine: no implementation for node"),
        ({"load": "no\nkernel"}, r"tensorrt 1\S+ cannot load this engine here: no kernel$"),
    ],
)
@pytest.mark.parametrize("version", WHEELS)
def test_what_tensorrt_refuses_is_one_line(api_of, installed, graph, version, broken, text):
    installed(api_of(version), **broken)
    with pytest.raises(UserError, match=text) as caught:
        tensorrt.build(graph, Profile(), None)
    assert "\n" not in str(caught.value)


def test_an_old_version_and_another_architecture_are_refused(api_of, installed, graph):
    trt = installed(api_of("11.4"))
    trt.__version__ = "10.11.0.33"
    assert "tensorrt 10.11.0.33 is older than 10.12" in tensorrt.cannot_build()
    with pytest.raises(UserError, match="builds for this host's SM89 only, not for SM=86"):
        tensorrt.build(graph, Profile(), (86,))
    tensorrt.require_target((89,))


@pytest.mark.parametrize("version", WHEELS)
def test_what_was_timed_is_kept_for_the_next_build_of_the_version_on_the_gpu(api_of, keeping, graph, version):
    install, cache = keeping
    trt = install(api_of(version))
    for timed in (b"timed ", b"timed timed "):
        tensorrt.build(graph, Profile(), None)
        (file,) = (path for path in cache.rglob("*") if path.is_file())
        assert file.read_bytes() == timed
    assert file.name == f"tensorrt_{trt.__version__.replace('.', '_')}_Made_up_GPU.cache"


@pytest.mark.parametrize("content", [b"damaged", b"another GPU"])
def test_timings_that_do_not_fit_are_made_anew(api_of, keeping, graph, content):
    install, cache = keeping
    install(api_of("11.4"))
    tensorrt.build(graph, Profile(), None)
    (file,) = (path for path in cache.rglob("*") if path.is_file())
    file.write_bytes(content)
    assert tensorrt.build(graph, Profile(), None).notes == ("a warning",)
    assert file.read_bytes() == b"timed "


def test_a_cache_that_cannot_be_written_is_said_and_no_home_is_no_fault(api_of, keeping, graph, monkeypatch):
    install, cache = keeping
    install(api_of("11.4"))
    cache.write_text("a file in the place of the folder")
    *_, note = tensorrt.build(graph, Profile(), None).notes
    assert note.startswith("timings of kernels are not kept for the next build: ")
    monkeypatch.setattr(timing_cache, "cache_folder", Mock(side_effect=UserError("no home")))
    assert tensorrt.build(graph, Profile(), None).notes == ("a warning",)
