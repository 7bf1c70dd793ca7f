"""The forms of a branch: what they compute, how they hang in a network, what the exported graph says."""

import copy
import dataclasses
import functools

import numpy as np
import pytest
import torch

from calib.network.fold import fold_affine
from calib.network.qdq import quantized_net
from calib.scales.calibrate import Config, calibrate
from compensation.branch import ConvBranch, DenseBranch, SharedBranch, engine_bytes
from compensation.carry import Call
from compensation.forms import FORMS, Place
from compensation.layout import Layout, group_count, layout_from_shapes
from compensation.moments import Fit, Moments
from deploy.bridge.export import export_pair, onnx_from_net
from deploy.bridge.parity import compare_with_onnx
from deploy.engine.audit import audit, planned_layers
from deploy.engine.build import Profile
from deploy.graph.check import check_strongly_typed
from tests.tiny import SIZE, TINY, half_of, rounded, tiny_batches, tiny_model


@functools.cache
def quantized_model(family, seed=0):
    """A tiny model with all scales decided; nobody edits it."""
    halves = [half_of(tiny_batches())] * 2
    model = fold_affine(tiny_model(family, seed), tiny_batches(1)[0][:1])
    return rounded(calibrate(model, halves, Config("max")), halves)


def block_layouts(model):
    """Layout of every block, from one forward pass."""
    found, handles = {}, []
    for name in model.structure.blocks:

        def after(_block, inputs, output, name=name):
            shapes = inputs[0].shape, output.shape
            found[name] = layout_from_shapes(name, *shapes, model.structure.blocks[name].channels_last)

        handles.append(model.net.get_submodule(name).register_forward_hook(after))
    with torch.no_grad():
        model.net(tiny_batches(1)[0])
    for handle in handles:
        handle.remove()
    return found


def branch_of(layout, size):
    """A branch with random numbers of about `size`."""
    fits = [
        Fit(size * torch.randn(layout.d_out, layout.d_in), size * torch.randn(layout.d_out))
        for _ in range(layout.groups)
    ]
    return DenseBranch(fits[0]) if layout.channels_last else ConvBranch(fits, layout.stride)


def with_branches(model, size):
    torch.manual_seed(0)
    return dataclasses.replace(
        model, branches={name: branch_of(layout, size) for name, layout in block_layouts(model).items()}
    )


def moments_of(layout, x, r):
    groups = [Moments(layout.d_in, layout.d_out) for _ in range(layout.groups)]
    for moments, rows, targets in zip(groups, layout.input_rows(x), layout.output_rows(r), strict=True):
        moments.update(rows, targets)
    return groups


@pytest.mark.parametrize("family", sorted(TINY))
def test_a_branch_of_zeros_leaves_the_output_bit_identical_and_another_does_not(family):
    model = quantized_model(family)
    x = tiny_batches(1)[0]
    with torch.no_grad():
        plain = quantized_net(model)(x)
        assert torch.equal(quantized_net(with_branches(model, 0.0))(x), plain)
        assert not torch.equal(quantized_net(with_branches(model, 0.01))(x), plain)


def test_attaching_copies_the_branch_and_the_network_can_be_copied():
    model = with_branches(quantized_model("vit"), 0.01)
    net = quantized_net(model)
    assert net.get_submodule("blocks.0.branch") is not model.branches["blocks.0"]
    other = copy.deepcopy(net)
    other.get_submodule("blocks.0.branch").bias.data.add_(1.0)
    x = tiny_batches(1)[0]
    with torch.no_grad():
        assert not torch.equal(net(x), other(x))  # the copy's hook reads the copy's branch
        assert torch.equal(net(x), quantized_net(model)(x))
    assert not any("branch" in name for name, _ in model.net.named_modules())


@pytest.mark.parametrize("family", ["vit", "resnet"])
@pytest.mark.slow
def test_the_exported_branch_has_its_own_names_and_the_graph_agrees(family):
    model = with_branches(quantized_model(family), 0.01)
    net = quantized_net(model)
    graph = onnx_from_net(net, torch.zeros(2, 3, SIZE, SIZE))
    names = {node.name for node in graph.graph.node}
    assert {f"{block}.branch/Conv" for block in model.branches} <= names
    before = {
        node.name
        for node in onnx_from_net(quantized_net(quantized_model(family)), torch.zeros(2, 3, SIZE, SIZE)).graph.node
    }
    assert before <= names
    found = compare_with_onnx(net, graph, tiny_batches(1)[0].numpy())
    assert found.failure() is None
    assert found.rel_l2 < 1e-5
    half = onnx_from_net(copy.deepcopy(net).half(), torch.zeros(2, 3, SIZE, SIZE).half())
    assert check_strongly_typed(half) == ()


def test_numbers_are_fp16_values_in_float32():
    branch = branch_of(Layout(True, 5, 4), 1.0)
    for value in branch.parameters():
        assert value.dtype == torch.float32
        assert torch.equal(value, value.half().float())


LAYOUTS = {
    "tokens": (Layout(True, 6, 4), (3, 5, 6), (3, 5, 4)),
    "maps": (Layout(False, 3, 4, 2, 1), (2, 6, 5, 5), (2, 8, 5, 5)),
    "stride 2, odd": (Layout(False, 3, 4, 2, 2), (2, 6, 7, 5), (2, 8, 4, 3)),
}


@pytest.mark.parametrize("case", sorted(LAYOUTS))
def test_a_branch_computes_its_affine_maps_on_the_rows_of_its_layout(case):
    layout, shape_x, shape_y = LAYOUTS[case]
    torch.manual_seed(0)
    x, branch = torch.randn(shape_x), branch_of(layout, 1.0)
    y = branch(x)
    assert y.shape == shape_y
    assert layout_from_shapes("b", x.shape, y.shape, layout.channels_last).stride == layout.stride
    rows = zip(branch.fits(), layout.input_rows(x), layout.output_rows(y), strict=True)
    for fit, rows_x, rows_y in rows:
        expected = rows_x.double() @ fit.weight.t() + fit.bias
        torch.testing.assert_close(rows_y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("c_in", "c_out", "groups"), [
    (64, 128, 1), (256, 512, 4), (64, 256, 1), (384, 640, 4), (16, 24, 1), (512, 512, 8), (192, 320, 2), (130, 130, 2),
])  # fmt: skip
def test_groups_divide_both_channel_counts(c_in, c_out, groups):
    assert group_count(c_in, c_out) == groups


@pytest.mark.parametrize(("c_in", "c_out", "groups"), [(64, 128, 1), (256, 512, 4)])
@pytest.mark.parametrize("side", [14, 15])
def test_a_conv_fit_is_least_squares_per_group_on_the_strided_positions(c_in, c_out, groups, side):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, c_in, side, side, generator=generator)
    r = torch.randn(8, c_out, -(-side // 2), -(-side // 2), generator=generator) + x.mean()
    layout = layout_from_shapes("layer2.0", x.shape, r.shape, channels_last=False)
    assert (layout.groups, layout.stride) == (groups, 2)
    branch = FORMS["dense"].fit(moments_of(layout, x, r), Place(layout))
    strided = x[:, :, ::2, ::2]
    for g, fit in enumerate(branch.fits()):
        mine, theirs = (slice(g * c // groups, (g + 1) * c // groups) for c in (c_in, c_out))
        columns = strided[:, mine].permute(0, 2, 3, 1).flatten(0, 2).double().numpy()
        targets = r[:, theirs].permute(0, 2, 3, 1).flatten(0, 2).double().numpy()
        expected = np.linalg.lstsq(np.c_[columns, np.ones(len(columns))], targets, rcond=None)[0]
        np.testing.assert_allclose(fit.weight.t().numpy(), expected[:-1], atol=1e-3 * np.abs(expected).max())  # FP16
        np.testing.assert_allclose(fit.bias.numpy(), expected[-1], atol=1e-3 * np.abs(expected).max())


def test_a_block_that_no_branch_can_serve_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'blocks\.1' turns tokens"):
        layout_from_shapes("blocks.1", torch.Size((2, 5, 8)), torch.Size((2, 4, 8)), channels_last=True)
    with pytest.raises(ValueError, match=r"'s1\.b1' turns a map"):
        layout_from_shapes("s1.b1", torch.Size((2, 8, 9, 9)), torch.Size((2, 8, 4, 4)), channels_last=False)


def test_the_bytes_of_an_engine_are_two_for_fp16_and_one_for_integers():
    dense, convolution = branch_of(Layout(True, 6, 4), 1.0), branch_of(Layout(False, 3, 4, 2, 1), 1.0)
    assert engine_bytes(dense) == 2 * (6 * 4 + 4)
    assert engine_bytes(convolution) == 2 * (2 * 3 * 4 + 2 * 4)
    shared = with_shared_branches().branches["blocks.0"]
    scales = 2 * (48 + 1)  # one per output channel, one of the input
    assert engine_bytes(shared) == 48 * 48 + 2 * 48 + scales


@pytest.mark.parametrize("family", ["vit", "resnet"])
@pytest.mark.slow
def test_a_dense_branch_adds_at_most_the_kernels_it_is_counted_with(family):
    pytest.importorskip("tensorrt_rtx")
    from deploy.engine.backends import tensorrt_rtx

    model = with_branches(quantized_model(family), 0.01)
    layouts = block_layouts(model)

    def kernels(*blocks):
        chosen = dataclasses.replace(model, branches={name: model.branches[name] for name in blocks})
        fp16, _ = export_pair(quantized_net(chosen), (SIZE, SIZE))
        return len(tensorrt_rtx.build(fp16, Profile(2, 4), (89,)).kernels)

    first, *_ = layouts
    counted = FORMS["dense"].kernels_at(Place(layouts[first], 0))
    plain = kernels()
    assert plain < kernels(first) <= plain + counted
    assert kernels(*layouts) <= plain + counted * len(layouts)


# the shared form


def small_fit(width):
    """Weights a hundred times smaller than those of qkv, as the branch of a good quantization has."""
    torch.manual_seed(1)
    return Fit(torch.randn(width, width) / width**0.5 / 100, torch.randn(width) / 100)


def with_shared_branches(reader="attn.qkv"):
    model = quantized_model("vit")
    width = model.net.embed_dim
    return dataclasses.replace(
        model,
        branches={
            name: SharedBranch(small_fit(width), reader, model.quantizers[f"{name}.{reader}:input"])
            for name in model.structure.blocks
        },
    )


READERS = {
    "attn.qkv": lambda block, x: block.norm1(x),
    "mlp.fc1": lambda block, x: block.norm2(x + block.attn(block.norm1(x))),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_shared_branch_adds_its_map_of_the_rounded_norm_output(reader):
    model = with_shared_branches(reader)
    branch, block = model.branches["blocks.1"], quantized_net(quantized_model("vit")).blocks[1]
    x = torch.randn(2, 5, 48)
    (fit,) = branch.fits()
    with torch.no_grad():
        read = model.quantizers[f"blocks.1.{reader}:input"].fake_quantize(READERS[reader](block, x)).double()
        expected = block(x).double() + read @ fit.weight.t() + fit.bias
        with_branch = quantized_net(model).blocks[1]
        found = with_branch(x)
        alone = with_branch.branch.of(with_branch, Call(x))
    torch.testing.assert_close(block(x) + alone, found)
    assert not hasattr(with_branch.get_submodule(reader), "shared_input"), "nothing is kept behind the block"
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    exact = small_fit(48)
    assert float((fit.weight - exact.weight).abs().max()) <= float(branch.weight_scale.max()) / 2 * 1.01


@pytest.mark.parametrize("reader", READERS)
def test_norm_and_quantizer_are_written_once_for_layer_and_branch(reader):
    net = quantized_net(with_shared_branches(reader))
    _, fp32 = export_pair(net, (SIZE, SIZE))
    readers = {n.name: n.input[0] for n in fp32.graph.node if n.op_type == "MatMul"}
    for block in ("blocks.0", "blocks.1"):
        assert readers[f"{block}.branch/MatMul"] == readers[f"{block}.{reader}/MatMul"]
    assert sum(n.op_type == "LayerNormalization" for n in fp32.graph.node) == 5
    assert compare_with_onnx(net, fp32, tiny_batches(1)[0].numpy()).failure() is None


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.slow
def test_a_shared_branch_costs_no_kernel_and_all_layers_are_int8(reader):
    pytest.importorskip("tensorrt_rtx")
    from deploy.engine.backends import tensorrt_rtx

    def built(model):
        fp16, _ = export_pair(quantized_net(model), (SIZE, SIZE))
        return audit(tensorrt_rtx.build(fp16, Profile(2, 4), (89,)).kernels, planned_layers(fp16))

    plain, shared = built(quantized_model("vit")), built(with_shared_branches(reader))
    assert (shared.planned, shared.lost) == (plain.planned + 2, ())
    assert shared.kernels == plain.kernels
