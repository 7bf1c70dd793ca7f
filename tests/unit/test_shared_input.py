import copy

import pytest
import torch
from torch import nn

from calib.calibrate import Config, calibrate
from calib.methods import rtn
from calib.qdq import quantized_net
from compensation.shared_input import attach_to_norm, share_input
from deploy.audit import audit, planned_layers
from deploy.export import export_pair, onnx_from_net
from deploy.parity import compare_with_onnx
from deploy.serialize import Profile
from tests.tiny import SIZE, tiny_batches, tiny_model, tiny_net

BLOCKS = ("blocks.0", "blocks.1")


def small_linear(width):
    """Weights a hundred times smaller than those of qkv, as the branch of a good quantization has."""
    linear = nn.Linear(width, width)
    linear.weight.data.mul_(0.01)
    return linear.requires_grad_(False)


def with_branches():
    """A two-block network with branches, calibrated: (simulation, size)."""
    model = tiny_model("vit")
    model = rtn.reduce_error(calibrate(model, [tiny_batches()], Config("max")), [tiny_batches()], rtn.Config())
    net = copy.deepcopy(model.net)
    for name in BLOCKS:
        branch = small_linear(net.embed_dim)
        attach_to_norm(net.get_submodule(name), branch)
        model = share_input(model, name).with_sites({f"{name}.branch:weight": rtn.channel_qparams(branch.weight)})
    return quantized_net(type(model)(model.name, model.float_net, net, model.family, model.sites))


def test_block_and_branch_are_added_in_float64():
    block = tiny_net("vit").blocks[0].double()
    branch, x = small_linear(48).double(), torch.randn(2, 5, 48, dtype=torch.float64)
    expected = block(x) + block.norm1(x) @ branch.weight.t() + branch.bias
    attach_to_norm(block, branch)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(copy.deepcopy(block)(x), expected, rtol=1e-12, atol=1e-12)


def test_the_graph_normalizes_and_quantizes_once_for_both():
    net = with_branches()
    _, fp32 = export_pair(net, (SIZE, SIZE))
    readers = {n.name: n.input[0] for n in fp32.graph.node if n.op_type == "MatMul"}
    for block in BLOCKS:
        assert readers[f"{block}.branch/MatMul"] == readers[f"{block}.attn.qkv/MatMul"]
    assert sum(n.op_type == "LayerNormalization" for n in fp32.graph.node) == 2 * len(BLOCKS) + 1
    assert compare_with_onnx(net, fp32, tiny_batches(1)[0].numpy()).failure() is None


def test_the_branch_costs_no_kernel_and_all_layers_are_int8():
    pytest.importorskip("tensorrt_rtx")
    from deploy.backends import tensorrt_rtx

    net = with_branches()
    plain = copy.deepcopy(net)
    for name in BLOCKS:
        block = plain.get_submodule(name)
        block._forward_hooks.clear()
        del block.branch
    found = []
    for candidate in (plain, net):
        graph = onnx_from_net(candidate.half(), torch.zeros(2, 3, SIZE, SIZE).half())
        kernels = tensorrt_rtx.build(graph, Profile(2, 4), (89,)).kernels
        found.append(audit(kernels, planned_layers(graph)))
    without, with_branch = found
    assert with_branch.planned == without.planned + len(BLOCKS)
    assert with_branch.lost == ()
    assert with_branch.kernels == without.kernels
    assert with_branch.int8_gemms == without.int8_gemms
