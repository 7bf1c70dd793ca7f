"""The promise of the whole chain, over many families of networks: nothing but their trace tells what they consist of."""

import pytest
import torch

from calib.network.qdq import quantized_net
from calib.quant_model import QuantModel
from calib.structure.proof import difference, output_of
from compensation.branch import SharedBranch
from deploy.bridge.export import export_float, export_pair
from deploy.bridge.parity import compare_with_onnx
from deploy.engine.audit import audit, planned_layers
from deploy.graph.check import check_strongly_typed
from deploy.measure.onnx_runner import OnnxRunner
from deploy.recipe import load_recipe
from deploy.stages import CalibrationImages, stages
from tests.families import FAMILIES, family_net
from tests.tiny import half_of

pytestmark = pytest.mark.slow

BUILT = {}


def built(family):
    """(float network, model by recipe int8_qwt, simulation, FP16 graph, FP32 graph, images), made once per family."""
    if family not in BUILT:
        BUILT.clear()  # tests of one family follow each other
        net, images = family_net(family)
        generator = torch.Generator().manual_seed(1)
        batches = [torch.randn(4, *images.shape[1:], generator=generator) for _ in range(4)]
        halves = [half_of(batches[:2]), half_of(batches[2:])]
        model, seen = QuantModel.of(family, net), CalibrationImages(images[:1], halves)
        for stage in stages(load_recipe("int8_qwt")):
            model = stage(model, seen)
        simulation = quantized_net(model)
        BUILT[family] = net, model, simulation, *export_pair(simulation, tuple(images.shape[2:])), images
    return BUILT[family]


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    return request.param


def test_equalised_is_the_same_function_as_float(family):
    net, model, *_, images = built(family)
    assert model.moved
    assert difference(output_of(net, images), output_of(model.exact_net, images)) < 1e-5


def test_simulation_and_graph_agree_layer_by_layer(family):
    *_, simulation, _, fp32, images = built(family)
    found = compare_with_onnx(simulation, fp32, images.numpy())
    assert found.failure() is None
    assert found.rel_l2 < 1e-5


def test_the_float_graph_is_the_float_network(family):
    net, *_, images = built(family)
    graph = export_float(net, tuple(images.shape[2:]))
    found = torch.from_numpy(OnnxRunner(graph.SerializeToString())(images.numpy()))
    assert difference(net(images), found) < 1e-4


def test_the_fp16_graph_has_no_other_float_type_and_gives_nearly_the_same(family):
    _, _, _, fp16, fp32, images = built(family)
    assert check_strongly_typed(fp16) == ()
    half, single = (OnnxRunner(graph.SerializeToString(), fused=False)(images.numpy()) for graph in (fp16, fp32))
    assert difference(torch.from_numpy(single), torch.from_numpy(half)) < 0.1  # ties that FP16 rounds the other way


def test_every_planned_layer_runs_in_an_int8_kernel(family):
    pytest.importorskip("tensorrt_rtx")
    from deploy.engine.backends import tensorrt_rtx
    from deploy.engine.build import Profile

    _, model, _, fp16, *_ = built(family)
    planned = planned_layers(fp16)
    beside = {f"{block}.branch" for block, branch in model.branches.items() if isinstance(branch, SharedBranch)}
    assert {name.split("/")[0] for name in planned} == {*model.quantized_layers} | beside
    found = audit(tensorrt_rtx.build(fp16, Profile(2, 4), (89,)).kernels, planned)
    assert found.lost == ()
    assert found.fp32_gemms == 0
