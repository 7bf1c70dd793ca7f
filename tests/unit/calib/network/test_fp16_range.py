import pytest
import torch
import torch.nn.functional as F
from torch import nn

from calib.errors import UserError
from calib.network.fp16_range import FP16_MAX, fp16_range, require_fp16_weights, watched
from deploy.bridge.export import export_pair
from tests.tiny import SIZE, TINY, tiny_batches, tiny_net


class Gain(nn.Module):
    """Multiplies by a buffer."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = nn.Buffer(torch.tensor(gain))

    def forward(self, x):
        return x * self.gain


class Residual(nn.Module):
    """The sum is seen by no leaf module."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.up, self.down = Gain(gain), Gain(0.0)

    def forward(self, x):
        return self.down(self.up(x) + self.up(x))


class Scores(nn.Module):
    """An attention whose scores are large and whose output is not."""

    def __init__(self, scale: float | None = None) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return F.scaled_dot_product_attention(x * 1000, x, x, scale=self.scale)


ONES = [torch.ones(2, 1, 3, 4)]


def test_the_largest_value_and_its_module_are_named():
    found = fp16_range(
        nn.Sequential(Gain(100.0), Gain(0.01)), [torch.tensor([[-5.0, 2.0]]), torch.tensor([[3.0, 4.0]])]
    )
    assert (found.module, found.largest, found.images) == ("0", 500.0, 2)
    assert found.headroom == pytest.approx(FP16_MAX / 500)
    assert found.to_json()["module"] == "0"
    assert found.warnings() == []


def test_a_sum_between_modules_is_seen():
    with pytest.raises(UserError, match=r"'1' reaches 8e\+04 on 1 calibration images, beyond FP16's 65504"):
        fp16_range(nn.Sequential(nn.Identity(), Residual(40000.0)), [torch.ones(1, 1)])


def test_attention_scores_are_seen():
    assert fp16_range(Scores(), ONES).largest == 1000 * 4 / 2
    found = fp16_range(Scores(1.0), ONES)
    assert (found.module, found.largest) == ("net (attention scores)", 4000.0)


class GroupedScores(nn.Module):
    """Four heads of queries, the last of them large, and two of keys and values."""

    def forward(self, x):
        heads = torch.tensor([1.0, 1.0, 1.0, 1000.0])[None, :, None, None]
        kv = x[:, :2] * torch.tensor([0.0, 1.0])[None, :, None, None]
        return F.scaled_dot_product_attention(x * heads, kv, kv, enable_gqa=True)


def test_scores_of_grouped_queries_are_those_with_their_own_keys():
    found = fp16_range(GroupedScores(), [torch.ones(2, 4, 3, 4)])
    assert (found.module, found.largest) == ("net (attention scores)", 2000.0)


def test_the_module_that_overflows_first_is_named():
    net = nn.Sequential(Gain(3e4), Gain(3.0), Gain(10.0))
    with pytest.raises(UserError, match="'1' reaches 9e"):
        fp16_range(net, [torch.ones(1, 1)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad):
    net = nn.Sequential(nn.Identity(), nn.ReLU())
    with pytest.raises(UserError, match=rf"computes {bad} on the calibration images, in FP32 already"):
        fp16_range(net, [torch.tensor([[1.0, bad]]), torch.ones(1, 2)])


def test_little_headroom_is_a_warning():
    (warning,) = fp16_range(Gain(FP16_MAX / 7), ONES).warnings()
    assert "'net' reaches 9358 of 65504" in warning
    assert fp16_range(Gain(FP16_MAX / 9), ONES).warnings() == []


def test_a_weight_beyond_fp16_is_refused_and_one_below_its_normal_numbers_is_named():
    with pytest.raises(UserError, match=r"'0\.gain' holds 1e\+05, beyond FP16's 65504"):
        require_fp16_weights(nn.Sequential(Gain(1e5)))
    found = fp16_range(nn.Sequential(Gain(1e-5), Gain(0.0), Gain(1.0)), ONES)
    assert found.subnormal == (("0.gain", pytest.approx(1e-5)),)
    assert "1 weight tensors lie below" in found.warnings()[0]


def test_infinity_in_a_buffer_is_no_weight():
    net = nn.Module()
    net.register_buffer("mask", torch.tensor([0.0, -float("inf")]))
    assert require_fp16_weights(net) == ()
    net.register_buffer("divisor", torch.tensor([1e5, float("inf")]))
    with pytest.raises(UserError, match=r"'divisor' holds 1e\+05"):
        require_fp16_weights(net)
    layer = nn.Linear(1, 1)
    layer.weight.data.fill_(float("inf"))
    with pytest.raises(UserError, match=r"'weight' holds inf"):
        require_fp16_weights(layer)


def test_export_refuses_such_a_weight_too():
    with pytest.raises(UserError, match="beyond FP16"):
        export_pair(nn.Sequential(Gain(1e5)), (4, 4))


@pytest.mark.parametrize("family", sorted(TINY))
def test_it_is_the_largest_input_or_output_of_any_layer_or_larger(family):
    net, batches = tiny_net(family), tiny_batches(2)
    seen = []
    hooks = [
        module.register_forward_hook(lambda _m, x, y: seen.append(max(float(x[0].abs().max()), float(y.abs().max()))))
        for module in net.modules()
        if not list(module.children())
    ]
    with torch.no_grad():
        outputs = [net(batch) for batch in batches]
    for hook in hooks:
        hook.remove()
    found = fp16_range(net, batches)
    assert max(seen) <= found.largest <= 3 * max(seen)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    with torch.no_grad(), watched(net):
        assert all(torch.equal(net(batch), output) for batch, output in zip(batches, outputs, strict=True))


def test_every_module_that_computes_is_seen():
    net = tiny_net("vit")
    with torch.inference_mode(), watched(net) as seen:
        net(torch.zeros(1, 3, SIZE, SIZE))
    assert {"blocks.0", "blocks.0.attn", "blocks.0.attn (attention scores)", "blocks.1.mlp.fc2", "norm"} <= seen.keys()


class Masked(nn.Module):
    """A mask of minus infinity, and a value beside it."""

    def forward(self, x):
        return (x.masked_fill(x > 0, -torch.inf)).softmax(-1)


def test_a_mask_of_minus_infinity_does_not_overflow_and_hides_nothing_beside_it():
    rows = torch.tensor([[-300.0, 2.0, -1.0]])
    assert fp16_range(nn.Sequential(Masked()), [rows]).largest == 300
    with pytest.raises(UserError, match="beyond FP16"):
        fp16_range(nn.Sequential(Masked()), [rows * 1000])
    with pytest.raises(UserError, match=r"'0' computes inf on the calibration images, in FP32 already"):
        fp16_range(nn.Sequential(Gain(1.0)), [torch.tensor([[torch.inf, 1.0]])])


def test_a_network_that_need_not_fit_is_looked_at_all_the_same():
    found = fp16_range(Gain(1e6), ONES, must_fit=False)
    assert found.largest == pytest.approx(1e6)
    assert found.headroom < 1
    with pytest.raises(UserError, match="give FLOAT=fp32"):
        fp16_range(Gain(1e6), ONES)
    with pytest.raises(UserError, match="give FLOAT=fp32"):
        fp16_range(nn.Sequential(Gain(6e4), Gain(2.0)), ONES)
