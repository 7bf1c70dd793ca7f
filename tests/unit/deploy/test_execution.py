"""An engine is held to what its graph computes: a real model.onnx of a tiny network, in the stand-in for TensorRT."""

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from calib.input_rows import arrays_from_rows, join_inputs
from calib.inputs import Input, Inputs
from calib.network.qdq import quantized_net
from calib.task import Task
from deploy.bridge.export import export_float, export_fp16, export_pair
from deploy.engine.backends import tensorrt
from deploy.engine.build import Profile, serialize_network
from deploy.engine.runner import EngineRunner
from deploy.execution import Execution, executed
from deploy.measure.accuracy import Fidelity
from deploy.package import MODEL_FP32
from deploy.steps import _execution
from deploy.verify import Reference, Verdict, verify_fidelity
from tests.gpu.host import HERE, gpu_host
from tests.tiny import SIZE, calibrated, rounded, tiny_batches, tiny_halves


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """(folder with the graphs, the FP16-typed graph, the float network's outputs, verdict on the graphs)."""
    halves, folder = tiny_halves(2), tmp_path_factory.mktemp("package")
    model = rounded(calibrated("vit", halves), halves)
    fp16, fp32 = export_pair(quantized_net(model), (SIZE, SIZE))
    onnx.save(fp16, folder / "model.onnx")
    onnx.save(fp32, folder / MODEL_FP32)
    onnx.save(export_float(model.float_net, (SIZE, SIZE)), folder / "float.onnx")
    images = [batch.numpy() for batch in tiny_batches(4, seed=7)]
    reference = Reference(folder / "float.onnx", images, images[0], Task("features"))
    verdict = verify_fidelity(folder, reference)
    assert verdict.failure() is None
    return folder, fp16, reference, verdict


def ran(package, trt):
    folder, fp16, reference, _ = package
    plan = tensorrt.build(fp16, Profile(2, 3), None).plan  # batches of four are cut in two
    with EngineRunner(plan, trt) as engine:
        return executed(engine, HERE.name, folder, reference)


def test_an_engine_that_computes_its_graph_holds(package, api_of, monkeypatch):
    found, verdict = ran(package, gpu_host(monkeypatch, api_of("11.4"))), package[-1]
    assert found.failure(verdict) is None
    assert found.fidelity.count == 16
    # the stand-in runs the FP16-typed graph as the oracle does, so on the golden images both have the same mean
    assert np.mean(found.golden_db) == pytest.approx(verdict.fp16_sqnr_db, abs=0.2)
    assert found.to_json()["executed"]
    assert found.to_json()["device"] == HERE.name
    assert HERE.name in found.summary()


def overflown(values):
    values = values.copy()
    values[:, 0] = np.inf
    return values


WRONG = {
    "images mixed up": lambda values: values[::-1],
    "overflow": overflown,
    "zeros": np.zeros_like,
    "noise": lambda values: values + np.random.default_rng(0).normal(0, 0.2 * values.std(), values.shape).astype("f2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_engine_that_computes_something_else_does_not_hold(package, api_of, monkeypatch, case):
    found = ran(package, gpu_host(monkeypatch, api_of("11.4"), outputs=WRONG[case]))
    assert "dB on the golden images where model.fp32.onnx reaches" in found.failure(package[-1])


class Captioned(nn.Module):
    """A picture and ids in."""

    def __init__(self):
        super().__init__()
        self.words, self.layer = nn.Embedding(9, 6), nn.Linear(6, 4)

    def forward(self, picture, ids, kept):
        return self.layer(picture.mean((2, 3)).repeat(1, 2) + (self.words(ids) * kept[:, :, None]).mean(1))


def test_an_engine_with_named_inputs_is_given_them_in_its_types(api_of, monkeypatch, tmp_path):
    inputs = Inputs((Input("picture", "float32", (3, 4, 4)), Input("ids", "int64", (5,)), Input("kept", "bool", (5,))))
    torch.manual_seed(0)
    net, rows = Captioned().eval(), torch.cat([torch.randn(6, 48), torch.randint(0, 9, (6, 5)), torch.ones(6, 5)], 1)
    rows[:, -2:] = 0
    join_inputs(net, inputs)
    onnx.save(export_float(net, rows[:2]), tmp_path / MODEL_FP32)
    trt = gpu_host(monkeypatch, api_of("11.4"))
    plan = serialize_network(trt, export_fp16(net, rows[:2]).SerializeToString(), Profile(2, 3), lambda _config: None)[
        0
    ]
    given = arrays_from_rows(inputs, rows.numpy())
    with EngineRunner(plan, trt) as run:
        found = executed(run, HERE.name, tmp_path, Reference(tmp_path / MODEL_FP32, [given], given, Task("features")))
    assert found.fidelity.count == 6
    assert min(found.golden_db) > 50


def result(golden, held_out):
    return Execution(None, "GPU", Fidelity(9, held_out, 1.0), golden_db=golden, graph_db=(30.0, 20.0, 28.0))


@pytest.mark.parametrize(
    ("golden", "held_out", "text"),
    [
        ((29.0, 18.0, 27.0), 28.0, None),
        ((31.0, 22.0, 29.0), 32.0, None),
        ((29.0, 19.0, 12.0), 28.0, "worst is image 2 of golden.npz, 12.0 instead of 28.0 dB"),
        ((9.0, 8.0, 27.0), 28.0, "worst is image 0 of golden.npz, 9.0 instead of 30.0 dB"),
        ((29.0, float("nan"), 27.0), 28.0, "worst is image 1 of golden.npz, nan instead of 20.0 dB"),
        (
            (29.0, 19.0, 27.0),
            20.0,
            "reaches 20.0 dB on 9 images where model.fp32.onnx reaches 30.0 dB: expected at least 27",
        ),
        ((29.0, 19.0, 27.0), float("nan"), "reaches nan dB on 9 images"),
    ],
)
def test_what_is_lost_is_said_with_the_worst_image(golden, held_out, text):
    verdict = Verdict(Fidelity(9, 30.0, 1.0), 30.0, 30.0)
    found = result(golden, held_out).failure(verdict)
    assert found is None if text is None else text in found


def test_an_engine_that_was_not_run_says_why_and_fails_nothing():
    found = Execution("no NVIDIA driver")
    assert found.failure(Verdict(Fidelity(9, 30.0, 1.0), 30.0, 30.0)) is None
    assert found.to_json() == {"executed": False, "not_executed": "no NVIDIA driver"}
    assert found.summary() == "not run: no NVIDIA driver"


def test_an_engine_for_other_gpus_is_not_run_and_says_so(package, api_of, monkeypatch):
    trt = gpu_host(monkeypatch, api_of("11.4"))
    plan = tensorrt.build(package[1], Profile(), None).plan
    trt.broken["load"] = "built for another\nGPU"
    evaluation = SimpleNamespace(labels=None)
    run = SimpleNamespace(backend=tensorrt, built=SimpleNamespace(plan=plan), evaluation=evaluation, progress=None)
    assert _execution(run).reason == f"tensorrt {trt.__version__} cannot load this engine here: built for another GPU"
