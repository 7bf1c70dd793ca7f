"""Graphs of networks with named inputs; what they compute is compared in tests/contract and tests/pipeline."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from calib.errors import UserError
from calib.input_rows import join_inputs, separated
from calib.inputs import Input, Inputs
from calib.outputs import join_outputs
from deploy.bridge import export
from deploy.bridge.export import export_float, export_fp16, export_pair, halved
from deploy.engine.backends import backends
from deploy.engine.build import Profile
from deploy.measure.onnx_runner import OnnxRunner
from deploy.package import stored_bytes

INPUTS = Inputs((Input("x", "float32", (3, 4)), Input("ids", "int64", ()), Input("kept", "bool", (4,))))


class Mixed(nn.Module):
    """Both the network and its module `net` write a Mul and an Add."""

    def __init__(self):
        super().__init__()
        self.net, self.words = Inner(), nn.Embedding(5, 4)

    def forward(self, x, ids, kept):
        y = self.net(x * 2.0 + self.words(ids)[:, None])
        return {"y": y, "mean": (y * kept[:, None]).mean(1)}


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) * 3.0 + x


@pytest.fixture(scope="module")
def mixed():
    """(network, four rows, what it computes of them by name)."""
    torch.manual_seed(0)
    net = Mixed().eval()
    rows = torch.cat([torch.randn(4, 12), torch.tensor([[0.0], [4], [2], [1]]), torch.rand(4, 4).round()], 1)
    expected = {name: value.detach().numpy() for name, value in net(**separated(INPUTS, rows)).items()}
    join_inputs(net, INPUTS)
    join_outputs(net, rows)
    return net, rows, expected


@pytest.mark.parametrize(("exported", "kind", "tolerance"), [(export_float, 1, 1e-5), (export_fp16, 10, 1e-2)])
def test_a_graph_has_the_inputs_and_outputs_of_the_network(mixed, exported, kind, tolerance):
    net, rows, expected = mixed
    graph = exported(net, rows[:2])
    types = {each.name: each.type.tensor_type for each in graph.graph.input}
    assert {name: each.elem_type for name, each in types.items()} == {
        "x": kind, "ids": onnx.TensorProto.INT64, "kept": onnx.TensorProto.BOOL
    }  # fmt: skip
    assert all(each.shape.dim[0].dim_param for each in types.values())
    given = {name: value.numpy() for name, value in separated(INPUTS, rows).items()}
    for count in (4, 1):
        found = OnnxRunner(graph.SerializeToString(), fused=False).named_outputs(
            {name: each[:count] for name, each in given.items()}
        )
        assert list(found) == ["y", "mean"]
        for name, value in found.items():
            np.testing.assert_allclose(value, expected[name][:count], atol=tolerance)


class Twice(nn.Module):
    """Returns one tensor under two names, and what it was given."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        y = self.layer(x).mean((2, 3))
        return {"last": y, "state": y, "seen": x}


def test_a_tensor_that_is_returned_twice_and_one_that_is_given_back_keep_their_names():
    net, images = Twice().eval(), torch.randn(2, 3, 8, 8)
    join_outputs(net, images)
    graph = export_float(net, (8, 8))
    assert [each.name for each in graph.graph.input] == ["input"]
    found = OnnxRunner(graph.SerializeToString()).named_outputs(images.numpy())
    assert list(found) == ["last", "state", "seen"]
    with torch.no_grad():
        expected = net.layer(images).mean((2, 3)).numpy()
    for name, array in {"last": expected, "state": expected, "seen": images.numpy()}.items():
        np.testing.assert_allclose(found[name], array, atol=1e-5)


def test_both_graphs_come_of_one_trace(mixed, monkeypatch):
    net, rows, _ = mixed
    traced, export_of = [], torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: traced.append(1) or export_of(*args, **options))
    half, single = export_pair(net, rows[:2])
    assert len(traced) == 1
    assert [node.name for node in half.graph.node] == [node.name for node in single.graph.node]


class Masked(nn.Module):
    """The least number of a type as a mask of what is negative, and a true minus infinity."""

    def forward(self, x):
        least = torch.where(x < 0, torch.finfo(x.dtype).min, 0.0)
        return (
            (1 - (x > 5).float()) * torch.finfo(torch.float32).min + x,
            (x + least).softmax(-1),
            x.clamp(min=-torch.inf),
        )


def test_numbers_beyond_fp16_stay_finite_in_fp16():
    x = torch.randn(2, 3, 4, 4)
    x[..., 0] = 0.5  # so that no row is masked as a whole
    runner = OnnxRunner(export_fp16(Masked(), (4, 4)).SerializeToString(), fused=False)
    first_one, second, third = runner.named_outputs(x.numpy()).values()
    assert (first_one <= -65000).all()
    np.testing.assert_allclose(second, Masked()(x)[1], atol=2e-3)
    np.testing.assert_allclose(third, x, atol=2e-3)


def test_nodes_of_a_module_called_as_the_network_itself_have_names_of_their_own(mixed):
    net, rows, _ = mixed
    names = [node.name for node in export_float(net, rows[:2]).graph.node]
    assert len({*names}) == len(names)
    assert {"net/Mul", "net/Mul_1"} <= {*names}


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x.flatten(1)[:, :4]).reshape(int(x.shape[0]), 4)


class ByLength(Fixed):
    def forward(self, x):
        return self.layer(x.flatten(1)[:, :4]).reshape(len(x), 4)


def test_the_length_of_a_tensor_follows_the_number_of_samples(tmp_path):
    net, images = ByLength().eval(), torch.rand(5, 3, 2, 2)
    onnx.save(export_float(net, (2, 2)), tmp_path / "net.onnx")
    torch.testing.assert_close(torch.from_numpy(OnnxRunner(tmp_path / "net.onnx")(images.numpy())), net(images))
    assert len(images) == 5  # Python's own again
    assert type(len([])) is int


def test_a_forward_pass_for_one_number_of_samples_is_refused():
    with pytest.raises(UserError, match=r"Fixed fixes the number of samples of 'input'.* x\.shape\[0\]"):
        export_float(Fixed().eval(), (2, 2))


class Folded(nn.Module):
    """Windows of an image, weighed and added up again."""

    def __init__(self, **window):
        super().__init__()
        self.window = window

    def forward(self, x):
        patches = nn.functional.unfold(x, **self.window)
        weights = torch.arange(patches.shape[1], dtype=x.dtype)[None, :, None]
        return nn.functional.fold(patches * weights, x.shape[-2:], **self.window)


FOLDS = [
    {"kernel_size": 3, "padding": 1, "stride": 2}, {"kernel_size": 2, "stride": 2},
    {"kernel_size": (3, 2), "stride": (1, 2)}, {"kernel_size": 3, "dilation": 2, "padding": 2},
]  # fmt: skip


@pytest.mark.parametrize("window", FOLDS, ids=str)
def test_windows_are_added_up_as_torch_does_by_an_operator_that_tensorrt_knows(window):
    net, images = Folded(**window).eval(), torch.rand(3, 3, 13, 10)
    graph = export_float(net, (13, 10))
    assert "Col2Im" not in {node.op_type for node in graph.graph.node}
    torch.testing.assert_close(torch.from_numpy(OnnxRunner(graph.SerializeToString())(images.numpy())), net(images))
    if backends()["tensorrt_rtx"].cannot_build() is None:
        assert backends()["tensorrt_rtx"].build(halved(graph), Profile(1, 4), (89,)).plan


class Attention(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x + 1, x)


@pytest.mark.parametrize(("width", "exact"), [(4, True), (16, True), (64, True), (8, False), (48, False)])
def test_the_scale_of_scores_is_split_into_powers_of_two_where_it_is_one(width, exact):
    model = export_float(Attention().eval(), torch.randn(2, 2, 5, width))
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    factors = [constants[node.input[1]].item() for node in model.graph.node if node.op_type == "Mul"]
    assert np.prod(factors) == pytest.approx(width**-0.5, rel=1e-6)
    assert all(np.frexp(each)[0] == 0.5 for each in factors) == exact  # the mantissa of a power of two


@pytest.mark.parametrize("scale", [-0.3, -0.25, 0.0])
def test_any_scale_of_scores_is_exported(scale):
    class Scaled(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x + 1, x, scale=scale)

    x = torch.randn(2, 2, 5, 4)
    found = OnnxRunner(export_float(Scaled().eval(), x).SerializeToString(), fused=False)(x.numpy())
    np.testing.assert_allclose(found, Scaled()(x).numpy(), atol=1e-6)


def test_a_graph_beyond_what_protobuf_holds_has_its_weights_beside_it(tmp_path, monkeypatch):
    graph, x = export_float(nn.Linear(64, 64).eval(), torch.randn(2, 64)), np.ones((3, 64), np.float32)
    export.save(graph, tmp_path / "whole.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["whole.onnx"]
    monkeypatch.setattr(export, "LARGEST_FILE", 0)
    export.save(graph, tmp_path / "apart.onnx")
    assert (tmp_path / "apart.onnx.weights").stat().st_size >= 4 * 64 * 64
    assert stored_bytes(tmp_path / "apart.onnx") > (tmp_path / "apart.onnx").stat().st_size
    expected, found = (OnnxRunner(tmp_path / name, fused=False)(x) for name in ("whole.onnx", "apart.onnx"))
    np.testing.assert_array_equal(found, expected)
    assert all(each.raw_data for each in onnx.load(tmp_path / "apart.onnx").graph.initializer)
