"""The node names that graph, parity check, audit and engine share."""

import onnx
import pytest

from calib.errors import UserError
from deploy.graph import names


@pytest.mark.parametrize("repeat", [0, 1, 12])
@pytest.mark.parametrize("layer", ["blocks.3.attn.qkv", "s1.b2.conv_1"])
def test_layer_and_operator_come_back_out_of_a_name(layer, repeat):
    node = names.node_name(layer, "MatMul", repeat)
    for name in (node, names.value_name(node, 2)):
        assert names.layer_from_name(name) == layer
        assert names.operator_from_name(name) == "MatMul"


def test_names_are_the_ones_that_engines_and_reports_show():
    assert names.node_name("blocks.0.attn", "MatMul", 1) == "blocks.0.attn/MatMul_1"
    assert names.node_name("", "Add") == "net/Add"
    assert names.value_name("a/Split", 0) == "a/Split"
    assert names.value_name("a/Split", 1) == "a/Split:1"
    assert names.renamed_operator("blocks.0.attn/MatMul_1", "ChannelScale") == "blocks.0.attn/ChannelScale_1"
    assert names.constant_name("a/DequantizeLinear", "scale") == "a/DequantizeLinear/scale"


def test_a_name_of_another_form_belongs_to_no_layer():
    assert names.layer_from_name("MatMul") == names.operator_from_name("MatMul") == ""
    assert names.renamed_operator("MatMul", "ChannelScale") == "MatMul/ChannelScale"


def model_with(*node_names):
    nodes = [
        onnx.helper.make_node(names.operator_from_name(name) or "Relu", ["x"], ["y"], name=name) for name in node_names
    ]
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], []))


def test_nodes_are_found_by_layer_and_operator():
    model = model_with("a/MatMul", "a/Add", "b/Conv", "a/MatMul_1")
    found = names.nodes_by_layer(model, "MatMul", "Conv")
    assert {layer: [node.name for node in nodes] for layer, nodes in found.items()} == {
        "a": ["a/MatMul", "a/MatMul_1"],
        "b": ["b/Conv"],
    }


@pytest.mark.parametrize("wrong", ["", "a/MatMul"])
def test_a_name_that_two_nodes_share_is_refused(wrong):
    model = model_with(wrong, wrong, "b/MatMul")
    assert names.require_unique(model, ["b/MatMul"]) == ("b/MatMul",)
    with pytest.raises(UserError, match="a name of its own"):
        names.require_unique(model, ["b/MatMul", wrong])
