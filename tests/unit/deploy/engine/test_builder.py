"""What the builder is told is read as meant, put where TensorRT looks for it, and refused where nothing takes it."""

import pytest

from calib.errors import UserError
from calib.network.qdq import quantized_net
from deploy.bridge.export import export_pair
from deploy.engine.backends import onnxruntime, tensorrt, tensorrt_rtx
from deploy.engine.build import Profile
from deploy.engine.builder import DEFAULT, Builder
from tests.gpu.bindings import WHEELS
from tests.gpu.host import HERE, gpu_host
from tests.tiny import SIZE, calibrated, rounded, tiny_halves


@pytest.mark.parametrize(
    ("text", "builder"),
    [
        ("", DEFAULT), ("level=5", Builder(level=5)), ("level=0,aux_streams=2", Builder(0, 2)),
        (" gpus = ampere+ , level=3", Builder(3, None, "ampere+")), ("gpus=same", Builder(gpus="same")),
    ],
)  # fmt: skip
def test_it_is_read_and_written(text, builder):
    assert Builder.from_text(text) == builder
    assert Builder.from_text(str(builder)) == builder


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("level=6", "level cannot be '6'"), ("level=-1", "level cannot be '-1'"), ("level", "level cannot be ''"),
        ("level=²", "level cannot be"), ("aux_streams=123", "aux_streams cannot be"),
        ("aux_streams=x", "aux_streams cannot be 'x'"), ("gpus=all", "gpus cannot be 'all'"),
        ("levl=3", r"no 'levl'; expected level=0..5, .* Did you mean 'level'"), ("level=1,level=2", "tells 'level' twice"),
    ],
)  # fmt: skip
def test_anything_else_is_one_line(text, said):
    with pytest.raises(UserError, match=said):
        Builder.from_text(text)


@pytest.fixture(scope="module")
def graph():
    halves = tiny_halves(2)
    return export_pair(quantized_net(rounded(calibrated("vit", halves), halves)), (SIZE, SIZE))[0]


@pytest.mark.parametrize("version", WHEELS)
def test_tensorrt_gets_it_by_the_names_of_its_bindings(api_of, monkeypatch, version, graph):
    trt, configured = gpu_host(monkeypatch, api_of(version)), []
    plain = tensorrt.build(graph, Profile(2, 3), None)
    assert plain.settings["builder"] == {"level": None, "aux_streams": None, "gpus": None}
    monkeypatch.setattr(tensorrt.Timings, "give", lambda _self, config: configured.append(config))
    built = tensorrt.build(graph, Profile(2, 3), None, Builder(5, 0, "ampere+"))
    (config,) = configured
    assert (config.builder_optimization_level, config.max_aux_streams) == (5, 0)
    assert config.hardware_compatibility_level == trt.HardwareCompatibilityLevel.AMPERE_PLUS
    assert built.targets == ("SM80+",)
    assert built.settings["builder"] == {"level": 5, "aux_streams": 0, "gpus": "ampere+"}
    assert tensorrt.build(graph, Profile(), None, Builder(gpus="same")).targets == ("SM89",)


def test_who_takes_none_of_it_says_so(monkeypatch):
    for backend in (tensorrt_rtx, onnxruntime):
        backend.require_target(None, DEFAULT)
        with pytest.raises(UserError, match=f"BUILDER=level=5 is for TARGET=tensorrt: that of {backend.NAME} takes"):
            backend.require_target(None, Builder(level=5))
    monkeypatch.setattr(tensorrt, "gpu", lambda: HERE.__class__("old", 75, 1, "13.0", None))
    with pytest.raises(UserError, match=r"this host's SM75 is older than Ampere"):
        tensorrt.require_target(None, Builder(gpus="ampere+"))
