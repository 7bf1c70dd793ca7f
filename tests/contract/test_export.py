"""The promise of the bridge, over every family: the ONNX graphs say what the simulation says."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from calib.network.fold import fold_affine
from calib.network.qdq import QuantConv2d, QuantLinear, quantized_net
from calib.outputs import OUTPUT
from calib.quant_model import QuantModel
from calib.scales.calibrate import Config, calibrate
from compensation.branch import ConvBranch, DenseBranch
from compensation.moments import Fit
from compensation.places import places
from deploy.bridge.export import export_float, export_pair
from deploy.bridge.parity import compare_with_onnx
from deploy.engine.audit import audit, planned_layers
from deploy.graph.check import check_strongly_typed
from deploy.graph.integer_kernels import integer_kernels
from deploy.graph.names import INPUT
from deploy.graph.separate_biases import separate_biases
from deploy.measure.accuracy import sqnr_db
from deploy.measure.onnx_runner import OnnxRunner
from tests.families import family_net
from tests.tiny import SIZE, TINY, half_of, rounded, tiny_batches, tiny_halves, tiny_model

pytestmark = pytest.mark.slow

BUILT: dict[str, tuple] = {}


def exported(family: str):
    """(model, simulation, FP16 graph, FP32 graph), made once per family."""
    if family not in BUILT:
        halves = tiny_halves(2)
        model = fold_affine(tiny_model(family), tiny_batches(1)[0][:1])
        model = rounded(calibrate(model, halves, Config("max")), halves)
        net = quantized_net(model)
        BUILT[family] = (model, net, *export_pair(net, (SIZE, SIZE)))
    return BUILT[family]


@pytest.fixture(params=sorted(TINY))
def family(request) -> str:
    return request.param


def test_simulation_and_graph_agree_layer_by_layer(family):
    _, net, _, fp32 = exported(family)
    found = compare_with_onnx(net, fp32, tiny_batches(1)[0].numpy())
    assert found.failure() is None
    assert found.rel_l2 < 1e-5


def test_a_wrong_scale_in_the_graph_is_found_and_named(family):
    model, net, _, fp32 = exported(family)
    layer = model.quantized_layers[3]
    broken = onnx.ModelProto.FromString(fp32.SerializeToString())
    reader = next(n for n in broken.graph.node if n.name in (f"{layer}/Conv", f"{layer}/MatMul"))
    producers = {output: n for n in broken.graph.node for output in n.output}
    node = producers[producers[reader.input[0]].input[0]]
    wrong = onnx.numpy_helper.from_array(
        np.array(float(model.quantizers[f"{layer}:input"].scale) * 1.3, np.float32), "wrong"
    )
    broken.graph.initializer.append(wrong)
    node.input[1] = "wrong"
    found = compare_with_onnx(net, broken, tiny_batches(1)[0].numpy())
    alike = [
        n
        for n in model.quantized_layers
        if model.quantizers[f"{n}:input"].scale == model.quantizers[f"{layer}:input"].scale
    ]
    assert found.suspect in alike  # layers that share the tensor share its QuantizeLinear
    assert found.suspect in found.failure()


def test_a_wrong_scale_in_one_of_several_calls_is_found_and_named():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.twice, self.last = (torch.nn.Linear(16, 16) for _ in range(3))

        def forward(self, x):
            x = self.first(x.flatten(1).unflatten(1, (-1, 16)))
            return self.last(self.twice(self.twice(x).tanh()))

    torch.manual_seed(0)
    halves = tiny_halves(2)
    model = fold_affine(QuantModel.of("twice", Twice().eval()), tiny_batches(1)[0][:1])
    net = quantized_net(rounded(calibrate(model, halves, Config("max")), halves))
    _, fp32 = export_pair(net, (SIZE, SIZE))
    images = tiny_batches(1)[0].numpy()
    assert compare_with_onnx(net, fp32, images).failure() is None
    second = next(node for node in fp32.graph.node if node.name == "twice/QuantizeLinear_1")
    fp32.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0.5, np.float32), "wrong"))
    second.input[1] = "wrong"
    assert "layer 'twice, call 2' gets other integers" in str(compare_with_onnx(net, fp32, images).failure())


def test_a_branch_beside_a_layer_itself_reads_what_the_layer_is_given_before_it_rounds():
    net, images = family_net("chain")
    halves = [half_of([images]), half_of([images.flip(3)])]
    model = rounded(calibrate(fold_affine(QuantModel.of("chain", net), images[:1]), halves, Config("max")), halves)
    found = places(model, quantized_net(model), images).of
    assert [*found] == ["features.3", "features.5", "hidden"] == [*model.quantized_layers]
    generator, branches = torch.Generator().manual_seed(0), {}
    for name, place in found.items():
        groups, shape = place.layout.groups, (place.layout.d_out, place.layout.d_in)
        fits = [Fit(torch.randn(shape, generator=generator) / 10, torch.randn(shape[0])) for _ in range(groups)]
        branches[name] = DenseBranch(fits[0]) if place.layout.channels_last else ConvBranch(fits, place.layout.stride)
    simulation = quantized_net(replace(model, branches=branches))
    assert not torch.equal(simulation(images), quantized_net(model)(images))
    _, fp32 = export_pair(simulation, tuple(images.shape[2:]))
    compared = compare_with_onnx(simulation, fp32, images.numpy())
    assert compared.failure() is None
    assert compared.rel_l2 < 1e-5


def test_the_fp16_graph_is_strongly_typed_and_both_hold_the_same_integers(family):
    _, _, fp16, fp32 = exported(family)
    assert check_strongly_typed(fp16) == ()
    onnx.checker.check_model(fp16, full_check=True)
    onnx.checker.check_model(fp32, full_check=True)

    def integers(model):
        found = {
            t.name: onnx.numpy_helper.to_array(t)
            for t in model.graph.initializer
            if t.data_type == onnx.TensorProto.INT8
        }
        return {name: value for name, value in found.items() if value.ndim > 1}

    first, second = integers(fp16), integers(fp32)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_every_quantized_layer_is_planned_in_the_graph_by_its_torch_name(family):
    model, net, fp16, _ = exported(family)
    layers = {name for name, m in net.named_modules() if isinstance(m, QuantLinear | QuantConv2d)}
    assert {name.split("/")[0] for name in planned_layers(fp16)} == layers == set(model.quantized_layers)


def test_batch_is_dynamic_and_names_are_fixed(family):
    _, _, fp16, fp32 = exported(family)
    for graph in (fp16, fp32):
        assert [i.name for i in graph.graph.input] == [INPUT]
        assert [o.name for o in graph.graph.output] == [OUTPUT]
    runner, images = OnnxRunner(fp32.SerializeToString()), tiny_batches(1)[0].numpy()
    together = runner(images)
    alone = np.concatenate([runner(images[i : i + 1]) for i in range(len(images))])
    assert together.shape == alone.shape == (len(images), together.shape[1])


def test_fp16_and_fp32_types_give_nearly_the_same_output(family):
    _, _, fp16, fp32 = exported(family)
    images = tiny_batches(1)[0].numpy()
    a = OnnxRunner(fp16.SerializeToString(), fused=False)(images)
    b = OnnxRunner(fp32.SerializeToString(), fused=False)(images)
    assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(b)  # FP16 flips ties; far less than the rounding itself


def test_the_float_graph_is_the_float_network(family):
    model, *_ = exported(family)
    images = tiny_batches(1)[0]
    with torch.no_grad():
        expected = model.float_net(images).numpy()
    found = OnnxRunner(export_float(model.float_net, (SIZE, SIZE)).SerializeToString())(images.numpy())
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_onnx_runtime_really_uses_integer_kernels(tmp_path):
    _, _, _, fp32 = exported("vit")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(fp32.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    assert sum("Integer" in kind or kind.startswith("QLinear") for kind in kinds) >= 8  # 4 linears in each of 2 blocks


@pytest.mark.parametrize("backend_family", sorted(TINY))
def test_rtx_engine_runs_every_planned_layer_in_int8(backend_family):
    pytest.importorskip("tensorrt_rtx")
    from deploy.engine.backends import tensorrt_rtx
    from deploy.engine.build import Profile

    _, _, fp16, _ = exported(backend_family)
    built = tensorrt_rtx.build(fp16, Profile(2, 4), (89,))
    found = audit(built.kernels, planned_layers(fp16))
    assert found.lost == ()
    assert found.fp32_gemms == 0
    assert bool(built.notes) == (backend_family != "vit")  # convolutions need a word of warning


def test_the_fp16_graph_has_biases_that_onnx_runtime_leaves_alone(family):
    _, _, fp16, _ = exported(family)
    assert separate_biases(fp16) == fp16


def test_integer_kernels_come_as_near_to_the_float_network_as_the_graph_they_are_written_for(family):
    model, _, fp16, fp32 = exported(family)
    images = tiny_batches(4)
    rewritten, written = integer_kernels(fp32)
    runners = [
        OnnxRunner(graph.SerializeToString(), fused=fused) for graph, fused in ((fp32, False), (rewritten, True))
    ]
    exact = np.concatenate([model.float_net(batch).detach().numpy() for batch in images])
    plain, integer = (sqnr_db(exact, np.concatenate([runner(batch.numpy()) for batch in images])) for runner in runners)
    print(f"{plain=:.2f} {integer=:.2f} {written}")
    assert integer > plain - 0.5
    assert sum(written.values()) >= 0.6 * len(planned_layers(fp16))  # not those of 3 x 3 whose sums stay float
