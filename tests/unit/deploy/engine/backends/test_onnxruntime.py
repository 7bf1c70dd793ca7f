"""Engines of ONNX Runtime: what they compute, what the audit sees of them, and what their runner refuses."""

import functools

import numpy as np
import onnx
import pytest
import torch

from calib.errors import UserError
from calib.network.qdq import quantized_net
from deploy.bridge.export import export_float, export_pair
from deploy.engine.audit import audit, planned_layers, require_int8
from deploy.engine.backends import onnxruntime
from deploy.engine.build import Profile
from deploy.engine.graph_runner import MOST, GraphRunner
from deploy.errors import ContractError
from deploy.graph.names import INPUT
from deploy.measure.accuracy import sqnr_db
from deploy.measure.onnx_runner import OnnxRunner
from tests.tiny import SIZE, calibrated, half_of, rounded, tiny_batches


@functools.cache
def graphs(family):
    """(the FP32-typed graph with Q/DQ nodes, the float graph) of a tiny network."""
    halves = [half_of(tiny_batches())] * 2
    model = rounded(calibrated(family, halves), halves)
    return export_pair(quantized_net(model), (SIZE, SIZE))[1], export_float(model.float_net, (SIZE, SIZE))


def images(count):
    return torch.cat(tiny_batches(count)).numpy()[:count]


@pytest.mark.parametrize("family", ["vit", "mobilenet"])
@pytest.mark.slow
def test_an_engine_computes_what_its_graph_does_with_every_layer_in_integers(family):
    graph, _ = graphs(family)
    built = onnxruntime.build(graph, Profile(2, 4), None)
    found = audit(built.kernels, planned_layers(graph))
    assert found.planned == found.int8_gemms + found.int8_convs > 0
    assert found.lost == ()
    nodes = [node["operator"] for node in built.layers["nodes"]]
    assert nodes.count("QAttention") == (2 if family == "vit" else 0)  # one per block
    assert len(built.kernels) == len(nodes)
    assert found.fused_attention == nodes.count("QAttention")
    assert found.int8_attention == 0
    with GraphRunner(built.plan) as run:
        (computed,) = run({INPUT: images(5)}).values()
    # the graph runs node by node; a bias of a convolution moves by half a step at most, which may change integers behind it
    expected = OnnxRunner(graph.SerializeToString(), fused=False)(images(5))
    assert sqnr_db(expected, computed) > (100 if family == "vit" else 25)
    assert not np.array_equal(computed, np.zeros_like(computed))


def test_a_graph_without_integers_is_no_int8_engine():
    _, float_graph = graphs("vit")
    planned = planned_layers(graphs("vit")[0])
    found = audit(onnxruntime.build(float_graph, Profile(), None).kernels, planned)
    assert len(found.lost) == found.planned
    with pytest.raises(ContractError, match=f"none of the {len(planned)} planned layers in integers"):
        require_int8(found, every=False)


def test_a_layer_that_stays_in_fp32_is_counted_as_such():
    graph = onnx.ModelProto.FromString(graphs("vit")[0].SerializeToString())
    planned = planned_layers(graph)
    node = next(node for node in graph.graph.node if node.name == planned[0])
    dequantize = next(each for each in graph.graph.node if node.input[1] in each.output)
    weight = next(each for each in graph.graph.initializer if each.name == dequantize.input[0])
    floats = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight).astype(np.float32), "float weight")
    graph.graph.initializer.append(floats)
    node.input[1] = "float weight"
    found = audit(onnxruntime.build(graph, Profile(), None).kernels, planned)
    assert found.lost == (planned[0],)
    require_int8(found, every=False)
    with pytest.raises(ContractError, match=planned[0]):
        require_int8(found)


def test_more_images_than_run_at_once_give_the_same():
    with GraphRunner(onnxruntime.build(graphs("vit")[0], Profile(), None).plan) as run:
        many = np.resize(images(3), (2 * MOST + 1, 3, SIZE, SIZE))
        (found,), (few,) = run({INPUT: many}).values(), run({INPUT: many[:3]}).values()
    np.testing.assert_allclose(found[:3], few, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[-1], few[2 * MOST % 3], rtol=1e-5, atol=1e-5)


def test_what_is_no_engine_or_no_input_is_one_line():
    with (
        pytest.raises(UserError, match=r"cannot load the engine .*: expected a graph that TARGET=onnxruntime built"),
        GraphRunner(b"no graph"),
    ):
        pass
    with GraphRunner(graphs("vit")[0].SerializeToString()) as run, pytest.raises(UserError, match="expected float32"):
        run({INPUT: images(2).astype(np.float16)})


def test_a_gpu_architecture_is_refused():
    with pytest.raises(UserError, match="TARGET=onnxruntime builds for CPUs: leave SM= out"):
        onnxruntime.build(graphs("vit")[0], Profile(), (89,))
