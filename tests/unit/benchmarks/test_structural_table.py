import pytest
import torch

from benchmarks import structural_table
from benchmarks.structural_table import (
    ENGINES,
    NETWORKS,
    PAGE,
    RESULT,
    figures,
    merged,
    noise,
    page,
    with_attention,
    with_branches,
    with_products,
)
from calib.methods import rtn
from calib.network.qdq import quantized_net
from compensation.branch import ConvBranch, DenseBranch, SharedBranch
from deploy.engine.kernels import Kernel, KernelTensor
from deploy.package import read_json
from tests.tiny import SIZE, calibrated, tiny_halves

IMAGE = torch.zeros(1, 3, SIZE, SIZE)


def rounded_tiny(family):
    return rtn.nearest(calibrated(family, tiny_halves(2, 2))).whole


@pytest.mark.parametrize(
    ("family", "forms", "kind"),
    [
        ("vit", ("dense",), DenseBranch),
        ("vit", ("shared", "shared_mlp"), SharedBranch),
        ("resnet", ("dense",), ConvBranch),
    ],
)
def test_every_block_gets_a_branch_that_changes_the_output(family, forms, kind):
    model = rounded_tiny(family)
    found = with_branches(model, forms, IMAGE)
    assert found.branches.keys() == model.structure.blocks.keys() != set()
    assert all(isinstance(branch, kind) for branch in found.branches.values())
    images = torch.randn(2, 3, SIZE, SIZE)
    assert not torch.equal(quantized_net(found)(images), quantized_net(model)(images))


def test_where_no_branch_can_stand_there_is_none():
    assert with_branches(rounded_tiny("resnet"), ("shared",), IMAGE) is None


def test_every_product_and_every_attention_is_in_int8():
    model, halves = rounded_tiny("vit"), tiny_halves(2, 2)
    found = with_products(with_attention(model, halves), halves)
    assert set(found.int8_attention) == set(model.structure.attentions) != set()
    assert set(found.int8_products) == set(model.quantized_layers) != set()
    images = torch.randn(2, 3, SIZE, SIZE)
    assert not torch.equal(quantized_net(found)(images), quantized_net(model)(images))


def test_a_network_of_convolutions_has_neither():
    model, halves = rounded_tiny("resnet"), tiny_halves(2, 2)
    assert with_products(model, halves) is None
    assert with_attention(model, halves) is None


def test_noise_is_16_images_and_the_same_every_time():
    first, second = ([batch for half in noise((3, 8, 8)) for batch in half] for _ in range(2))
    assert sum(len(batch) for batch in first) == 16
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


def test_figures_of_an_engine():
    x, w = KernelTensor("x", "int8", (1000,), True), KernelTensor("w", "int8", (8000,))
    gemm = Kernel(
        "k",
        "gemm",
        ("int8", "int8"),
        ("fp16",),
        ("fc/MatMul",),
        (x, w),
        (KernelTensor("y", "fp16", (500,), True),),
        10**9,
    )
    found = figures([gemm, gemm], ["fc/MatMul", "fc2/MatMul"])
    assert (found["kernels"], found["int8_gemms"], found["lost"]) == (2, 2, ["fc2/MatMul"])
    assert found["mb_per_image"] == pytest.approx(2 * (1000 + 8000 / 8 + 1000) / 1e6)
    assert found["gmac_per_image"] == 2.0


def test_new_rows_replace_old_ones_in_the_order_of_the_networks():
    built = dict.fromkeys(ENGINES)
    rows = [built | {"network": name, "is": "old"} for name in (NETWORKS[2], NETWORKS[0])]
    new = [built | {"network": NETWORKS[2], "is": "new"}]
    assert merged(rows, new) == [rows[1], *new]
    del rows[1]["fp8"]
    assert merged(rows, new) == new, "a row of an older version lacks what is counted now"


def test_an_unknown_network_is_refused(capsys):
    assert structural_table.main(["vgg16"]) == 2
    assert "unknown network 'vgg16': expected some of vit_s" in capsys.readouterr().err


def test_the_page_is_made_from_the_result():
    result = read_json(RESULT)
    assert PAGE.read_text() == page(result)
    assert all(row["network"] in PAGE.read_text() for row in result["rows"])


def test_the_page_says_why_there_is_no_engine():
    counted = figures([], [])
    row = dict.fromkeys(ENGINES, counted) | {"network": "swin_t", "commit": "abc", "int8_dense": {"none": "no chain"}}
    row["int8_shared"] = counted | {"fused_attention": 12, "int8_attention": 3}
    text = page({"rows": [row], "version": "1.7"})
    assert "|  | INT8 + QwT, dense | none |  |  |  |  |" in text
    assert "- swin_t, INT8 + QwT, dense: no chain\n" in text
    assert "| 12 (3 INT8) |" in text
    assert "TensorRT-RTX 1.7 for SM89, built at commit abc." in text
