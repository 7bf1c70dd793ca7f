"""TensorRT-RTX builds one engine for Ampere and later, or for the architectures that SM= names."""

import re

import pytest
from onnx import TensorProto, helper

from deploy.engine.architectures import RTX_DEFAULT
from deploy.engine.audit import audit, planned_layers
from deploy.engine.backends import tensorrt_rtx
from deploy.engine.build import Profile
from tests.unit.deploy.engine.backends.test_tensorrt import exported

pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module")
def graph():
    return exported()


def accelerators(plan):
    """The architectures in the headers of the engine's programs, but of programs inside a launch."""
    return {found for found in re.findall(rb"accelerators=\{([^}]*)\}", plan) if found != b"*"}


@pytest.mark.parametrize(
    ("sms", "targets", "written"),
    [(None, RTX_DEFAULT, b"sm80 "), ((89,), ("SM89",), b"sm89 "), ((80, 120), ("SM80", "SM120"), b"sm80 sm120 ")],
)
def test_an_engine_is_for_ampere_and_later_unless_it_is_narrowed(graph, sms, targets, written):
    built = tensorrt_rtx.build(graph, Profile(2, 4), sms)
    assert built.targets == targets
    assert accelerators(built.plan) == {written}
    assert not audit(built.kernels, planned_layers(graph)).lost
    assert built.settings["compute_capabilities"] == list(sms or ())
    shown = ["\n".join(lines) for lines in built.layers["programs"]]
    assert len(shown) == built.plan.count(b"\nmain {\n") > 0
    assert all(layer in "".join(shown) for layer in planned_layers(graph))


def test_a_graph_without_int8_has_no_note_on_convolutions():
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["N", 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], name="a/Relu")], "g", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    assert tensorrt_rtx.build(model, Profile(), None).notes == ()
