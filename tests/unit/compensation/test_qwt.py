"""QwT on tiny networks. Oracle: hooks on the finished network, least squares on stored samples."""

import copy
import dataclasses
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from calib.families import Family
from calib.network.qdq import quantized_net
from calib.quant_model import QuantModel
from calib.quantizer import QMAX, QParams
from compensation.carry import CARRIES, Call, call_of
from compensation.chain import chain_shapes
from compensation.forms import FORMS, Place
from compensation.layout import Layout
from compensation.qwt import BlockSums, Config, Joined, compensate, fit_branch
from deploy.bridge.export import onnx_from_net
from tests.tiny import tiny_batches
from tests.unit.compensation.test_branch import quantized_model

DENSE = Config(forms=("dense",), ridges=(0.0,))  # the paper's fit
ALWAYS = dataclasses.replace(DENSE, min_gain_db=-1e9, kernel_price=0.0, by_output=False)


def halves(batches):
    """Two folds."""
    return [batches[: len(batches) // 2], batches[len(batches) // 2 :]]


def tried(found):
    """What was found of the only form, per block in order."""
    return [entries[0] for entries in found.history[-1].details["tried"].values()]


def coarse(model, levels=7):
    """`model` with weights and activations on a grid of about 2 * `levels` + 1 values (7: 4 bits), by coarser scales.

    Scales grow; integers stay small because the data they divide stays the same.
    """
    return model.with_quantizers(
        {quantizer: QParams(q.scale * (QMAX / levels), q.axis, q.narrow) for quantizer, q in model.quantizers.items()}
    )


def block_inputs(net, names, images):
    """{block: its inputs over all images, concatenated} in one plain run of `net`."""
    found = {name: [] for name in names}
    handles = [
        net.get_submodule(name).register_forward_pre_hook(lambda _m, args, name=name: found[name].append(args[0]))
        for name in names
    ]
    with torch.no_grad():
        for batch in images:
            net(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def stored_fit(x, r):
    """(W^T, b) of tokens x (B, T, d), r by lstsq on all of them."""
    x, r = x.flatten(0, 1).double().numpy(), r.flatten(0, 1).double().numpy()
    found = np.linalg.lstsq(np.c_[x, np.ones(len(x))], r, rcond=None)[0]
    return found[:-1], found[-1]


class Plain(nn.Module):
    """A block of a chain that is no network of timm."""

    def __init__(self, d):
        super().__init__()
        self.linear = nn.Linear(d, d)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class Shifted(Plain):
    """`Plain` minus a known affine map."""

    def __init__(self, plain, weight, bias):
        super().__init__(weight.shape[0])
        self.linear = plain.linear
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x):
        return super().forward(x) - (x @ self.weight.t() + self.bias)


CHAIN = Family("chain", frozenset(), frozenset(), r"\d+", ((".*", "test"),), 99.99, channels_last=True)


def planted(d=5, blocks=2):
    """A chain whose blocks differ from the exact ones by known maps W0 x + b0 (FP16 values)."""
    torch.manual_seed(0)
    exact = nn.Sequential(*(Plain(d) for _ in range(blocks))).eval()
    maps = [((0.2 * torch.randn(d, d)).half().float(), torch.randn(d).half().float()) for _ in range(blocks)]
    net = nn.Sequential(*(Shifted(exact[i], *maps[i]) for i in range(blocks))).eval()
    return QuantModel("chain", exact, net, exact, CHAIN), maps


def tokens(count=3, seed=0, d=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 7, d, generator=generator) + 2 for _ in range(count)]


# 1. planted maps


@pytest.mark.parametrize("target", ["local", "global"])
@pytest.mark.parametrize("carry", sorted(CARRIES))
def test_planted_maps_are_returned(carry, target):
    model, maps = planted()
    found = compensate(model, halves(tokens(4)), dataclasses.replace(DENSE, carry=carry, target=target))
    for name, (weight, bias) in enumerate(maps):
        branch = found.branches[str(name)]
        torch.testing.assert_close(branch.weight.flatten(1), weight, rtol=0, atol=1e-6)
        torch.testing.assert_close(branch.bias, bias, rtol=0, atol=1e-6)
    assert all(detail["r2_cv"] == pytest.approx(1, abs=1e-9) for detail in tried(found))
    with torch.no_grad():
        x = tokens(1, seed=9)[0]
        torch.testing.assert_close(quantized_net(found)(x), model.float_net(x), rtol=1e-5, atol=1e-5)


# 4. what is not worth its place


def noise_model():
    """A chain whose second block is wrong by noise that no input explains."""

    class Noisy(Plain):
        def forward(self, x):
            return super().forward(x) + torch.sin(1e4 * x).roll(1, -1)

    model, _ = planted()
    net = copy.deepcopy(model.net)
    net[1] = Noisy(5)
    net[1].linear = model.exact_net[1].linear
    return dataclasses.replace(model, net=net)


def test_unexplained_noise_gets_no_branch_in_the_network_nor_in_the_graph():
    model = noise_model()
    found = compensate(model, halves(tokens(4)), DENSE)
    assert set(found.branches) == {"0"}
    details = tried(found)
    assert details[1]["r2"] >= 0  # on its own samples least squares always gains
    assert details[1]["r2_cv"] <= 0
    assert any("no branch at 1" in note for note in found.history[-1].notes)
    both = compensate(planted()[0], halves(tokens(4)), DENSE)
    for result, expected in ((found, False), (both, True)):
        net = quantized_net(result)
        graph = onnx_from_net(net, torch.zeros(2, 7, 5))
        assert any(name == "1.branch" for name, _ in net.named_modules()) == expected
        assert any(node.name.startswith("1.branch/") for node in graph.graph.node) == expected


def test_branches_that_do_not_serve_the_output_all_go():
    found = compensate(planted()[0], halves(tokens(4)), dataclasses.replace(DENSE, min_gain_db=1e9))
    assert not found.branches
    assert found.history[-1].details["kept"] == {}
    assert "not worth it, dropped" in found.history[-1].notes[-1]


def test_a_block_without_error_gets_no_branch():
    model, _ = planted()
    found = compensate(dataclasses.replace(model, net=model.exact_net), halves(tokens(4)), DENSE)
    assert not found.branches
    assert all("changes nothing" in detail["reason"] for detail in tried(found))


def test_a_branch_whose_outputs_overflow_fp16_is_dropped():
    sums = BlockSums(Place(Layout(True, 2, 2), 1), 2)
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) * 500
    for fold in range(2):
        sums.update(x[fold::2], 300 * x[fold::2], fold)
    branch, found = fit_branch("dense", sums, Place(sums.layout, 1), Config())
    assert branch is None
    assert "overflow FP16" in found["reason"]
    assert fit_branch("dense", sums_of(x / 500, 300 * x / 500), Place(sums.layout, 1), Config())[0] is not None


def sums_of(x, r, layout=None, folds=2, step=1):
    sums = BlockSums(Place(layout or Layout(True, x.shape[-1], r.shape[-1]), 1), folds)
    for fold in range(folds):
        sums.update(x[fold::folds], r[fold::folds], fold, step)
    return sums


def test_weights_no_fp16_branch_can_hold_drop_the_block_with_a_reason():
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) * 1e-6
    branch, found = fit_branch("dense", sums_of(x, x * 1e7), Place(Layout(True, 2, 2), 1), Config())
    assert branch is None
    assert "weights below 1000" in found["reason"]


def test_few_noisy_samples_take_the_ridge_that_serves_the_other_fold_best():
    torch.manual_seed(0)
    x = torch.randn(4, 20, 24)
    r = x @ (0.1 * torch.eye(24)) + torch.randn(4, 20, 24)
    sums, place = sums_of(x, r), Place(Layout(True, 24, 24), 1)
    found = {
        ridges: fit_branch("dense", sums, place, Config(forms=("dense",), ridges=ridges, r2_min=-99))[1]
        for ridges in ((0.0,), (3.0,), (0.0, 3.0, 0.03))
    }
    chosen = found[0.0, 3.0, 0.03]
    assert chosen["ridge"] == 3.0
    assert chosen["r2_cv"] == found[3.0,]["r2_cv"] > found[0.0,]["r2_cv"] + 0.1
    assert chosen["r2"] == found[3.0,]["r2"] < found[0.0,]["r2"], "the kept branch is damped as the judged ones"
    exact = fit_branch("dense", sums_of(x, x @ torch.randn(24, 24)), place, Config(forms=("dense",)))[1]
    assert exact["ridge"] == 0.0, "the paper's fit where there is no noise"


def test_r2_min_is_a_limit_on_the_cross_validated_r2():
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(400, 3, generator=generator), torch.randn(400, 3, generator=generator)
    sums = sums_of(x, x + noise)
    found = fit_branch("dense", sums, Place(sums.layout, 1), DENSE)[1]
    assert 0.4 < found["r2_cv"] < found["r2"] < 0.6
    assert (
        fit_branch("dense", sums, Place(sums.layout, 1), dataclasses.replace(DENSE, r2_min=found["r2_cv"] - 1e-9))[0]
        is not None
    )
    assert (
        fit_branch("dense", sums, Place(sums.layout, 1), dataclasses.replace(DENSE, r2_min=found["r2_cv"]))[0] is None
    )


def test_official_r2_of_maps_is_about_the_mean_of_every_position():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, 4, 4, generator=generator)
    r = 3 * x + torch.randn(60, 2, 4, 4, generator=generator) + 3 * torch.randn(1, 2, 4, 4, generator=generator)
    sums = sums_of(x, r, Layout(False, 2, 2))
    branch, found = fit_branch("dense", sums, Place(sums.layout, 1), ALWAYS)
    assert branch is not None
    residual = (r - branch.branch(x)).double().square().sum()
    assert found["r2_official"] == pytest.approx(
        float(1 - residual / (r - r.mean(0)).double().square().sum()), abs=1e-5
    )
    thinned = sums_of(x, r, Layout(False, 2, 2), step=3)
    assert fit_branch("dense", thinned, Place(sums.layout, 1), ALWAYS)[1]["r2_official"] == pytest.approx(
        found["r2_official"], abs=0.02
    )
    of_channels = (r - r.mean((0, 2, 3), keepdim=True)).double().square().sum()
    assert found["r2"] == pytest.approx(float(1 - residual / of_channels), abs=1e-5)


# 5. never worse on the samples fitted


@pytest.mark.parametrize("family", ["vit", "resnet", "mobilenet", "regnet"])
def test_every_kept_branch_lowers_the_error_it_was_fitted_on(family):
    found = compensate(coarse(quantized_model(family)), halves(tiny_batches(32)), ALWAYS)
    details = tried(found)
    assert list(found.history[-1].details["tried"]) == list(found.family.blocks(found.net))
    assert found.branches
    for name, detail in zip(found.family.blocks(found.net), details, strict=True):
        assert detail["kept"] == (name in found.branches)
        if detail["kept"]:
            assert 0 < detail["r2_cv"] <= detail["r2"] <= 1
            assert detail["error_after"] <= detail["error_before"]
    with torch.no_grad():
        assert quantized_net(found)(tiny_batches(1)[0]).isfinite().all()


# what is run, and how often


def exact_runs(model, config, batches=32):
    """(what `compensate` gives, how often it ran each block of the exact network)."""
    exact, runs = copy.deepcopy(model.exact_net), {}
    for name in model.family.blocks(exact):

        def count(_block, _args, _output, name=name):
            runs[name] = runs.get(name, 0) + 1

        exact.get_submodule(name).register_forward_hook(count)
    return compensate(dataclasses.replace(model, exact_net=exact), halves(tiny_batches(batches)), config), runs


def test_limits_that_rule_a_form_out_need_no_second_pass():
    both = dataclasses.replace(ALWAYS, forms=("shared", "dense"))
    free, _ = exact_runs(coarse(quantized_model("vit")), both)
    assert "dense" in {found["form"] for found in free.history[-1].details["kept"].values()}
    found, runs = exact_runs(coarse(quantized_model("vit")), dataclasses.replace(both, max_extra_kernels=0))
    assert {kept["form"] for kept in found.history[-1].details["kept"].values()} == {"shared"}
    assert runs == {"blocks.0": 32, "blocks.1": 32}


def test_blocks_whose_branch_was_left_out_run_once():
    found, runs = exact_runs(coarse(quantized_model("vit")), dataclasses.replace(ALWAYS, max_extra_kernels=1))
    (kept,) = found.branches
    (other,) = {"blocks.0", "blocks.1"} - {kept}
    assert runs == {kept: 64, other: 32}
    assert any(f"beyond a limit: dense at {other} (R2 " in note for note in found.history[-1].notes)


@pytest.mark.parametrize("forms", [("shared", "dense"), ("shared",)], ids=str)
def test_a_form_that_no_block_can_take_is_named_and_costs_nothing(forms):
    found, runs = exact_runs(coarse(quantized_model("mobilenet")), dataclasses.replace(ALWAYS, forms=forms))
    assert any("'shared' does not apply" in note and "family 'mobilenet'" in note for note in found.history[-1].notes)
    assert bool(found.branches) == bool(runs) == ("dense" in forms)
    assert set(runs.values()) <= {32}
    assert found.history[-1].sqnr_before_db <= found.history[-1].sqnr_after_db


# 6. state


def test_each_block_is_fitted_on_compensated_inputs_against_the_exact_block():
    model, images = coarse(quantized_model("vit")), tiny_batches(32)
    found = compensate(model, halves(images), ALWAYS)
    names = found.family.blocks(found.net)
    inputs = block_inputs(quantized_net(found), names, images)  # of the finished network: all branches at work
    plain = quantized_net(model)
    for name in names:
        with torch.no_grad():
            x = inputs[name]
            r = model.exact_net.get_submodule(name)(x) - plain.get_submodule(name)(x)
        weight, bias = stored_fit(x, r)
        branch = found.branches[name]
        torch.testing.assert_close(
            found.branches[name].weight.flatten(1).t().double(), torch.from_numpy(weight), rtol=2e-3, atol=1e-4
        )
        torch.testing.assert_close(branch.bias.double(), torch.from_numpy(bias), rtol=2e-3, atol=1e-3)


def test_the_global_target_is_the_exact_networks_own_path():
    model, images = coarse(quantized_model("vit")), tiny_batches(96)
    found = compensate(model, halves(images), dataclasses.replace(ALWAYS, target="global"))
    last = found.family.blocks(found.net)[-1]
    x = block_inputs(quantized_net(found), [last], images)[last]
    exact_x = block_inputs(model.exact_net, [last], images)[last]
    with torch.no_grad():
        r = model.exact_net.get_submodule(last)(exact_x) - quantized_net(model).get_submodule(last)(x)
    torch.testing.assert_close(
        found.branches[last].weight.flatten(1).t().double(), torch.from_numpy(stored_fit(x, r)[0]), rtol=2e-3, atol=2e-4
    )


def test_the_target_is_the_frozen_network_after_weights_were_changed():
    model, images = coarse(quantized_model("vit")), tiny_batches(32)
    changed = copy.deepcopy(model.net)
    with torch.no_grad():
        changed.get_submodule("blocks.0.mlp.fc2").bias.add_(1.0)
    found = compensate(dataclasses.replace(model, net=changed), halves(images), ALWAYS)
    assert found.exact_net is model.exact_net
    plain = compensate(model, halves(images), ALWAYS)
    shift = found.branches["blocks.0"].bias - plain.branches["blocks.0"].bias
    torch.testing.assert_close(shift, -torch.ones_like(shift), rtol=0, atol=2e-3)  # FP16 of values near 1


@pytest.mark.parametrize("target", ["local", "global"])
@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_all_carries_give_the_same_branches(family, target):
    model, images = coarse(quantized_model(family)), tiny_batches(32)
    found = [
        compensate(model, halves(images), dataclasses.replace(ALWAYS, carry=carry, target=target)) for carry in CARRIES
    ]
    for other in found[1:]:
        assert tried(other) == tried(found[0])
        for name, branch in found[0].branches.items():
            for mine, theirs in zip(branch.parameters(), other.branches[name].parameters(), strict=True):
                assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("carry", "flat"), [("memory", False), ("disk", True), ("recompute", True)])
def test_memory_does_not_grow_with_the_images(carry, flat):
    most = {}
    for count in (4, 24):
        model, outputs = planted()[0], []

        def watch(_block, _args, output, outputs=outputs, count=count):
            outputs.append(weakref.ref(output))
            most[count] = max(most.get(count, 0), sum(output() is not None for output in outputs))

        for net in (model.net, model.exact_net):
            net[0].register_forward_hook(watch)
        compensate(model, halves(tokens(count)), dataclasses.replace(DENSE, carry=carry))
    assert (most[24] == most[4]) == flat, most


def test_the_model_and_its_networks_are_untouched_and_no_hook_is_left():
    model, images = coarse(quantized_model("vit")), tiny_batches(32)
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    compensate(model, halves(images), DENSE)
    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())
    for net in (model.net, model.exact_net):
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())
    assert not model.branches


def test_a_second_run_replaces_the_branches_of_the_first():
    model, images = coarse(quantized_model("vit")), tiny_batches(32)
    once = compensate(model, halves(images), ALWAYS)
    twice = compensate(once, halves(images), ALWAYS)
    assert len(once.branches) == 2
    for name, branch in once.branches.items():
        assert torch.equal(branch.weight, twice.branches[name].weight)


# the pieces


def test_batches_know_their_fold():
    joined = Joined([tokens(2), tokens(3)])
    assert joined.fold_of == [0, 0, 1, 1, 1]
    assert len(joined) == len(list(joined)) == 5
    assert Joined([tokens(4)]).fold_of == [0, 0, 1, 1]  # one photograph


def test_the_call_of_a_block_is_captured_with_all_its_arguments_and_the_rest_is_not_run():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Identity()

        def forward(self, x):
            self.block.forward = lambda x, *_, **__: x
            self.block(x + 1, x * 0, scale=3)
            raise AssertionError("ran on")

    call = call_of(Net(), "block", torch.ones(2))
    assert torch.equal(call.x, torch.full((2,), 2.0))
    assert torch.equal(call.args[0], torch.zeros(2))
    assert call.kwargs == {"scale": 3}
    assert float(call.run(lambda x, mask, scale: (x * scale + mask).sum())) == 12
    assert Call(torch.ones(1)).run(nn.Identity()) == 1


class Between(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](x) * 2)


class InPlace(nn.Module):
    def forward(self, x):
        return x.add_(1)


class Masks(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (type("B", (nn.Module,), {"forward": lambda _, x, m: x + m})() for _ in range(2))

    def forward(self, x):
        return self.second(self.first(x, 1), 2)


@pytest.mark.parametrize(("net", "blocks", "message"), [
    (Between(nn.ReLU(), nn.Tanh()), ("0", "1"), "block '1' does not read what block '0' returns"),
    (nn.Sequential(nn.Tanh(), InPlace()), ("0", "1"), "block '1' edits its input"),
    (Masks(), ("first", "second"), "block 'second' gets other further arguments than block 'first'"),
    (nn.Sequential(nn.Tanh(), Between(nn.ReLU(), nn.Tanh(), nn.Tanh())), ("0", "1.2"), "without calling block '1.2'"),
])  # fmt: skip
def test_blocks_that_are_no_chain_are_refused_by_name(net, blocks, message):
    with pytest.raises(ValueError, match=message):
        chain_shapes(net, blocks, torch.ones(2, 3))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize(("options", "message"), [
    ({"forms": ("cubic",)}, "form 'cubic' is not one of dense, shared, shared_mlp, diagonal, low_rank"),
    ({"rows": 0}, "rows is 0"), ({"target": "x"}, "one of local, global"),
    ({"carry": "x"}, "one of memory, disk, recompute"), ({"rank": 0}, "rank is 0"),
])  # fmt: skip
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Config(**options)


@pytest.mark.parametrize("form", ["diagonal", "low_rank", "shared", "shared_mlp"])
def test_cheaper_forms_compensate_too(form):
    model, images = coarse(quantized_model("vit")), halves(tiny_batches(48))
    cheap, dense = (
        tried(compensate(model, images, dataclasses.replace(ALWAYS, forms=(name,), rank=8)))[0]
        for name in (form, "dense")
    )
    assert cheap["kept"]
    assert cheap["r2"] <= dense["r2"] + (0.05 if FORMS[form].shares else 1e-4)  # another input may tell more; FP16


# 9. end to end


def test_held_out_error_of_four_bit_vits_falls_with_each_branch():
    """Mean over networks, of the output's squared error on images the fit has not seen, none / one / both branches."""
    errors = []
    for seed in range(4):
        model = coarse(quantized_model("vit", seed))
        found = compensate(model, halves(tiny_batches(48, seed=10 + seed)), ALWAYS)
        assert len(found.branches) == 2
        steps = []
        for count in range(3):
            net = quantized_net(dataclasses.replace(found, branches=dict(list(found.branches.items())[:count])))
            with torch.no_grad():
                held_out = tiny_batches(8, seed=50 + seed)
                steps.append(np.mean([float((net(x) - model.float_net(x)).square().mean()) for x in held_out]))
        errors.append(steps)
    mean = np.mean(errors, axis=0)
    assert all(np.diff(mean) < 0), errors
