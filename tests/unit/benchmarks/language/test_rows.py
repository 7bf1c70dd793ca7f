"""The rows are recipes of the bits they name, and QwT repairs what it has to."""

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.language.networks import Language, Loaded
from benchmarks.language.rows import ROWS, Bench, chosen_rows, recipe
from benchmarks.language.texts import Texts
from calib.device import CPU
from calib.errors import UserError
from calib.input_rows import join_inputs
from calib.inputs import Input, Inputs
from calib.outputs import join_outputs

TOKENS, VOCABULARY, WIDTH = 12, 30, 256


@pytest.mark.parametrize("name", [name for name in ROWS if name != "float"])
def test_a_row_is_a_recipe_of_the_bits_it_names(name):
    found = recipe(name)
    precision = found.precision
    if name.startswith("w4_g128"):
        assert (precision.weights, precision.inputs, precision.weight_group) == (4, 32, 128)
        with pytest.raises(UserError, match=r"is simulated only: .* weight_group = 128"):
            found.for_engine()
    else:
        bits = int(name.split("_")[1])
        assert (precision.weights, precision.inputs, precision.weight_group) == (bits, bits, None)
    assert (found.equalise is not None) == name.startswith("smoothquant")
    assert (found.compensate is not None) == name.endswith("_qwt")
    methods = {"adaq": "adaq", "adaqtransform": "adaround"}
    assert found.method == methods.get(name.rpartition("_")[2], "rtn")


def test_rows_are_chosen_by_name_in_their_order_and_float_is_always_there():
    assert chosen_rows("") == tuple(ROWS)
    assert chosen_rows("smoothquant_8,w4_g128") == ("float", "w4_g128", "smoothquant_8")
    assert chosen_rows("float") == ("float",)
    with pytest.raises(UserError, match=r"unknown row 'w4_128': expected some of float, .*Did you mean 'w4_g128'"):
        chosen_rows("w4_128")


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.linear(x)


class Logits:
    def __init__(self, logits):
        self.logits = logits


class Chain(nn.Module):
    """Blocks without a nonlinearity: what rounding their weights does is a linear map of what they read."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(*(Residual() for _ in range(3)))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids, use_cache):  # noqa: ARG002 - the interface of transformers
        return Logits(self.head(self.blocks(self.embedding(input_ids))))


def outliers_in_one_group():
    """One weight per row is so large that the others of its group round to 0; inputs are correlated, of four directions."""
    torch.manual_seed(0)
    chain = Chain()
    with torch.no_grad():
        chain.embedding.weight.copy_(torch.randn(VOCABULARY, 4) @ torch.randn(4, WIDTH))
        chain.embedding.weight[:, 3] = 0.01
        for block in chain.blocks:
            block.linear.weight[:, 3] = 5.0
    net = Language(chain).eval().requires_grad_(False)
    join_inputs(net, Inputs((Input("input_ids", "int64", (TOKENS,)),)))
    join_outputs(net, torch.zeros(2, TOKENS))
    return Loaded("chain", net, VOCABULARY, TOKENS, random=True)


def test_qwt_repairs_weights_with_outliers_in_one_group():
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (30, TOKENS))
    bench = Bench(outliers_in_one_group(), Texts(ids), CPU)
    exact, plain, repaired = (bench.measure(name)["figures"] for name in ("float", "w4_g128", "w4_g128_qwt"))
    assert (exact["agreement"], exact["loss_more"]) == (1.0, 0.0)
    assert plain["sqnr_db"] < 15
    assert repaired["sqnr_db"] > plain["sqnr_db"] + 20
    assert plain["agreement"] < 0.95 < repaired["agreement"]
    assert abs(repaired["loss_more"]) < abs(plain["loss_more"]) / 5
