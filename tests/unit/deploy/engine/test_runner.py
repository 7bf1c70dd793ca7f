"""Engines give what their graphs compute, over the real bindings of TensorRT and memory of the host.

Oracle: numpy, and ONNX Runtime inside the stand-in.
"""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from calib.errors import UserError
from deploy.engine.build import Profile, serialize_network
from deploy.engine.load import REASONS
from deploy.engine.runner import EngineRunner
from deploy.errors import ContractError
from deploy.gpu import why_no_gpu
from tests.gpu.fake_trt import FakeTensorRT
from tests.gpu.host_device import HostDevice

WEIGHT = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float16)


def graph(kind=TensorProto.FLOAT16):
    """Two inputs of different types, two outputs: x w + y and -x."""
    nodes = [
        helper.make_node("Cast", ["y"], ["half"], to=kind),
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Add", ["product", "half"], ["sum"]),
        helper.make_node("Neg", ["x"], ["negative"]),
    ]
    values = [("x", kind, 6), ("y", TensorProto.FLOAT, 2), ("sum", kind, 2), ("negative", kind, 6)]
    tensors = [helper.make_tensor_value_info(name, dtype, ["N", size]) for name, dtype, size in values]
    made = helper.make_graph(nodes, "two", tensors[:2], tensors[2:], [numpy_helper.from_array(WEIGHT, "w")])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)


def given(count):
    generator = np.random.default_rng(count)
    return {"x": generator.normal(size=(count, 6)).astype(np.float16), "y": np.ones((count, 2), np.float32)}


@pytest.fixture
def device():
    return HostDevice()


@pytest.fixture
def trt(api, device):
    return FakeTensorRT(api, device)


def plan_of(trt, profile=None):
    return serialize_network(trt, graph().SerializeToString(), profile or Profile(2, 4), lambda _config: None)[0]


@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
def test_outputs_are_those_of_the_graph_for_any_number_of_images(trt, device, count):
    asked = given(count)
    with EngineRunner(plan_of(trt), trt, device) as run:
        for _ in range(2):
            found = run(asked)
            assert found.keys() == {"sum", "negative"}
            assert found["sum"].dtype == np.float16
            np.testing.assert_array_equal(found["negative"], -asked["x"])
            # FP16 sums of six products, in another order
            np.testing.assert_allclose(found["sum"], asked["x"].astype(np.float32) @ WEIGHT + 1, rtol=0, atol=2e-2)
    assert device.closed
    assert sum(buffer.nbytes for buffer in device.buffers) == 4 * (6 * 2 + 2 * 4 + 2 * 2 + 6 * 2)  # the largest batch


WRONG = {
    "missing": (lambda asked: {"x": asked["x"]}, "the engine takes x, y, but was given x"),
    "none": (lambda _asked: {}, "but was given nothing"),
    "unknown": (lambda asked: {**asked, "z": asked["x"]}, "but was given x, y, z"),
    "dtype": (lambda asked: {**asked, "x": asked["x"].astype(np.float32)},
              r"input 'x' is float32 \(3, 6\): expected float16 \(N, 6\)"),
    "shape": (lambda asked: {**asked, "y": np.ones((3, 5), np.float32)},
              r"input 'y' is float32 \(3, 5\): expected float32 \(N, 2\)"),
    "scalar": (lambda asked: {**asked, "y": np.float32(1)}, r"input 'y' is float32 \(\)"),
    "counts": (lambda asked: {**asked, "y": asked["y"][:2]}, "different numbers of images"),
    "empty": (lambda asked: {name: array[:0] for name, array in asked.items()}, "0 images cannot be cut"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line(api_of, device, case):
    trt = FakeTensorRT(api_of("rtx"), device)
    changed, text = WRONG[case]
    with EngineRunner(plan_of(trt), trt, device) as run, pytest.raises(UserError, match=text) as caught:
        run(changed(given(3)))
    assert "\n" not in str(caught.value)


BROKEN = {
    "load": (UserError, "cannot load this engine here: Version tag does not match"),
    "context": (UserError, "cannot prepare the engine"),
    "run": (ContractError, "the engine refuses to run: Cuda failure"),
}
SAID = {"load": "Version tag\n does not match", "run": "Cuda failure\n [ at x.cpp ]"}


@pytest.mark.parametrize("case", BROKEN)
def test_an_error_of_tensorrt_is_one_line_and_the_device_is_closed(trt, device, case):
    plan, (kind, text) = plan_of(trt), BROKEN[case]
    trt.broken[case] = SAID.get(case)
    with pytest.raises(kind, match=text) as caught, EngineRunner(plan, trt, device) as run:
        run(given(1))
    assert "\n" not in str(caught.value)
    assert device.closed


def test_memory_that_the_gpu_lacks_is_one_line(trt, device, monkeypatch):
    def full(_size):
        raise RuntimeError("cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY")

    plan = plan_of(trt)
    monkeypatch.setattr(device, "alloc", full)
    with (
        pytest.raises(UserError, match=r"no 0 MB left for 'x' \(cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY\): free some"),
        EngineRunner(plan, trt, device),
    ):
        pass
    assert device.closed


@pytest.mark.parametrize(
    ("bits", "text"),
    [
        (1, "another version"),
        (2, "SM="),
        (3, "another version.*; .*SM="),
        (32, "damaged"),
        (64 + 4, "driver is too old.*CUDA"),
    ],
)
def test_rtx_says_why_it_does_not_take_an_engine(api_of, device, bits, text):
    trt = FakeTensorRT(api_of("rtx"), device)
    plan, trt.broken["validity"] = plan_of(trt), bits
    with pytest.raises(UserError, match=f"cannot load this engine here: .*{text}"), EngineRunner(plan, trt, device):
        pass


def test_every_reason_of_rtx_has_its_words(api_of):
    assert REASONS.keys() == api_of("rtx").enums["EngineInvalidityDiagnostics"].keys()


@pytest.fixture
def real_rtx():
    return pytest.importorskip("tensorrt_rtx")


def test_the_installed_rtx_refuses_what_is_no_engine(real_rtx, device):
    with (
        pytest.raises(
            UserError, match=r"tensorrt_rtx 1\.\S+ cannot load this engine here: it is no engine, or a damaged"
        ),
        EngineRunner(b"x" * 2000, real_rtx, device),
    ):
        pass


def test_the_installed_rtx_has_no_gpu_to_judge_a_sound_engine_for(real_rtx, device):
    if why_no_gpu() is None:
        pytest.skip("there is a GPU")
    plan, _ = serialize_network(real_rtx, graph().SerializeToString(), Profile(2, 4), lambda _config: None)
    with pytest.raises(UserError, match=r"cannot load this engine here: no NVIDIA driver$"):
        EngineRunner(plan, real_rtx, device).__enter__()


def test_rtx_keeps_its_kernels_between_runs(api_of, device, tmp_path):
    trt, file = FakeTensorRT(api_of("rtx"), device), tmp_path / "kernels"
    plan = plan_of(trt)
    with EngineRunner(plan, trt, device, file):
        assert not hasattr(trt, "read")
    assert file.read_bytes() == b"compiled kernels"
    with EngineRunner(plan, trt, HostDevice(), file):
        assert trt.read == b"compiled kernels"


def test_a_captured_engine_runs_on_what_was_bound(trt, device):
    asked, other = given(3), given(2)
    with EngineRunner(plan_of(trt), trt, device) as run:
        run.bind(asked)
        work = device.captured(run.enqueue, run.stream)
        device.launch(work, run.stream)
        np.testing.assert_array_equal(run.fetch()["negative"], -asked["x"])
        run.bind(other)
        run.enqueue()
        np.testing.assert_array_equal(run.fetch()["negative"], -other["x"])


def test_a_type_that_numpy_lacks_is_named(trt, device):
    plan, _ = serialize_network(trt, graph(TensorProto.BFLOAT16).SerializeToString(), Profile(), lambda _config: None)
    with pytest.raises(UserError, match="tensor 'x' of the engine has type BF16"), EngineRunner(plan, trt, device):
        pass
