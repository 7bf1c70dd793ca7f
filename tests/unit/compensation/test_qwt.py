"""QwT on tiny networks. Oracle: hooks on the finished network, least squares on stored samples."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from calib.images.batches import ROTATIONS, Half, Part
from calib.network.fold import fold_affine
from calib.network.qdq import quantized_net
from calib.quant_model import QuantModel
from calib.quantizer import QMAX, QParams
from calib.scales.calibrate import Config as CalibrateConfig
from calib.scales.calibrate import calibrate
from calib.structure.blocks import Block
from calib.structure.proof import difference
from calib.structure.structure import Structure
from compensation import qwt
from compensation.block_calls import reads_on, seen_blocks
from compensation.carry import Call, Carry, call_of
from compensation.forms import Place
from compensation.layout import Layout
from compensation.qwt import BlockSums, Config, Joined, candidates, fit_branch
from deploy.bridge.export import onnx_from_net
from tests.families import family_net
from tests.tiny import half_of, rounded, tiny_batches, tiny_halves
from tests.unit.compensation.test_branch import quantized_model

DENSE = Config(forms=("dense",), ridges=(0.0,))  # the paper's fit
ALWAYS = dataclasses.replace(DENSE, min_r2_per_kernel=0.0)


def all_branches(model, halves, config=ALWAYS):
    """`model` with all branches that were fitted, of all images."""
    return candidates(model, halves, config).candidates[-1].whole


def tried(offer):
    """What was found of the only form, per block in order."""
    return [entries[0] for entries in offer.details["tried"].values()]


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


def stored_fit(x, r, rcond=None):
    """(W^T, b) of tokens x (B, ..., d), r by lstsq on all of them."""
    x, r = x.flatten(0, -2).double().numpy(), r.flatten(0, -2).double().numpy()
    found = np.linalg.lstsq(np.c_[x, np.ones(len(x))], r, rcond=rcond)[0]
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


def chain_of(blocks):
    """The structure of a chain of `blocks`, none of whose layers is quantized."""
    return Structure("Chain", {}, blocks={str(index): Block(str(index), channels_last=True) for index in range(blocks)})


def planted(d=5, blocks=2):
    """A chain whose blocks differ from the exact ones by known maps W0 x + b0 (FP16 values)."""
    torch.manual_seed(0)
    exact = nn.Sequential(*(Plain(d) for _ in range(blocks))).eval()
    maps = [((0.2 * torch.randn(d, d)).half().float(), torch.randn(d).half().float()) for _ in range(blocks)]
    net = nn.Sequential(*(Shifted(exact[i], *maps[i]) for i in range(blocks))).eval()
    return dataclasses.replace(QuantModel.of("chain", exact, chain_of(blocks)), net=net), maps


def tokens(count=3, seed=0, d=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 7, d, generator=generator) + 2 for _ in range(count)]


def halves(count=2):
    """Two halves of `count` batches of tokens each."""
    return [half_of(tokens(count, seed)) for seed in (0, 1)]


# planted maps


def test_planted_maps_are_returned():
    model, maps = planted()
    offer = candidates(model, halves(), DENSE)
    (every,) = offer.candidates
    for found in (*every.trials[0], *every.trials[1], every.whole):
        for name, (weight, bias) in enumerate(maps):
            branch = found.branches[str(name)]
            torch.testing.assert_close(branch.weight.flatten(1), weight, rtol=0, atol=1e-6)
            torch.testing.assert_close(branch.bias, bias, rtol=0, atol=1e-6)
        with torch.no_grad():
            x = tokens(1, seed=9)[0]
            torch.testing.assert_close(quantized_net(found)(x), model.float_net(x), rtol=1e-5, atol=1e-5)
    assert all(detail["r2_cv"] == pytest.approx(1, abs=1e-9) for detail in tried(offer))
    assert every.whole.branch_figures == {str(name): detail for name, detail in enumerate(tried(offer))}
    assert offer.notes[0] == "branches fitted at 2 of 2 blocks (dense x2), held-out R2 1.00"


class Sized(nn.Module):
    """A block that passes a size on beside its tensor, in a tuple or a list."""

    def __init__(self, block, kind):
        super().__init__()
        self.block, self.kind = block, kind

    def forward(self, given):
        x, size = given if isinstance(given, self.kind) else (given, 7)
        return self.kind((self.block(x), size))


class SizedChain(nn.ModuleList):
    """Such blocks one after another."""

    def forward(self, x):
        size = 7
        for block in self:
            x, size = block(x)
        return x * size


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_branch_stands_beside_the_first_of_what_a_block_returns(kind):
    model, maps = planted()
    nets = [SizedChain(Sized(block, kind) for block in net).eval() for net in (model.float_net, model.net)]
    model = dataclasses.replace(QuantModel.of("chain", nets[0], chain_of(2)), net=nets[1])
    found = candidates(model, halves(), DENSE).candidates[-1].whole
    for name, (weight, bias) in enumerate(maps):
        torch.testing.assert_close(found.branches[str(name)].weight.flatten(1), weight, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.branches[str(name)].bias, bias, rtol=0, atol=1e-6)
    with torch.no_grad():
        x = tokens(1, seed=9)[0]
        torch.testing.assert_close(quantized_net(found)(x), model.float_net(x), rtol=1e-5, atol=1e-5)


# which images fit, and which are told the truth


def altered(images, which, part):
    """`images` with others in one part of one half."""
    images = list(images)
    parts = list(images[which].parts)
    parts[part] = Part(tokens(1, seed=7))
    images[which] = Half(tuple(parts))
    return images


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("which", [0, 1])
def test_a_branch_of_a_half_is_fitted_on_that_half_alone_and_the_whole_on_both(which, part):
    model, _ = planted()
    curved = copy.deepcopy(model.net)
    curved[0].register_forward_hook(lambda _block, args, output: output + 0.3 * torch.sin(3 * args[0]))
    model = dataclasses.replace(model, net=curved)

    def weights(images):
        every = candidates(model, images, ALWAYS).candidates[-1]
        return [found.branches["0"].weight for found in (*every.trials[0], every.whole)]

    pairs = zip(weights(halves()), weights(altered(halves(), which, part)), strict=True)
    assert [not torch.equal(one, other) for one, other in pairs] == [which == 0, which == 1, True]


def test_held_out_r2_is_of_the_images_of_the_other_half():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 30, 5, generator=generator, dtype=torch.float64)  # by part: half by half
    r = x @ torch.randn(5, 3, generator=generator).double() + torch.randn(4, 30, 3, generator=generator).double()
    sums = BlockSums(Place(Layout(True, 5, 3)), 4)
    for part in range(4):
        sums.update(x[part], r[part], part)
    fitted, found = fit_branch("dense", sums, Place(sums.layout), ALWAYS)
    error = 0.0
    by_half = fitted.trials[0].by_half
    for fit_on, tried_on, branch in ([0, 1], [2, 3], by_half[0]), ([2, 3], [0, 1], by_half[1]):
        weight, bias = stored_fit(x[fit_on], r[fit_on])
        np.testing.assert_allclose(branch.weight.flatten(1).t(), weight, atol=2e-3)  # FP16
        error += float(np.square(r[tried_on].numpy() - x[tried_on].numpy() @ weight - bias).sum())
    total = float((r - r.mean((0, 1))).square().sum())
    assert found["r2_cv"] == pytest.approx(1 - error / total, abs=1e-3)
    for rotation, (part, _) in enumerate(ROTATIONS):  # of one part alone
        others = [(part + 2, by_half[0]), (part, by_half[1])]
        error = sum(
            float((r[at] - x[at] @ branch.weight.flatten(1).t().double() - branch.bias).square().sum())
            for at, branch in others
        )
        both = r[[part, part + 2]]
        total = float((both - both.mean((0, 1))).square().sum())
        assert fitted.trials[rotation].r2 == pytest.approx(1 - error / total, abs=1e-6)
    assert found["samples"] == 120


# what is offered


def test_the_branches_worth_keeping_are_offered_before_all_of_them(monkeypatch):
    model, images = planted()[0], halves()
    (every,) = candidates(model, images, DENSE).candidates
    asked = []
    monkeypatch.setattr(qwt, "worth_keeping", lambda *args: asked.append(args) or (["1"], [["1"], ["0", "1"]]))
    fewer, again = candidates(model, images, DENSE).candidates
    ((candidate, given, kernels, cost),) = asked
    assert (kernels, cost) == ({"0": 1, "1": 1}, DENSE.min_r2_per_kernel)
    assert [set(each.branches) for each in candidate.trials[0]] == [{"0", "1"}] * 2
    assert given is images
    assert [set(each.branches) for each in fewer.trials[1]] == [{"0", "1"}] * 2
    for one, other, before in zip(*((*each.trials[0], each.whole) for each in (fewer, again, every)), strict=True):
        assert (set(one.branches), set(other.branches)) == ({"1"}, {"0", "1"})
        assert set(one.branch_figures) == {"1"}
        for branch in (one.branches["1"], other.branches["1"]):
            assert torch.equal(branch.weight, before.branches["1"].weight)
    for answer in ([], ["0", "1"]):
        monkeypatch.setattr(qwt, "worth_keeping", lambda *_args, answer=answer: (answer, [answer] * 2))
        assert len(candidates(model, images, DENSE).candidates) == 1


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
    offer = candidates(noise_model(), halves(), DENSE)
    assert set(offer.candidates[-1].whole.branches) == {"0"}
    details = tried(offer)
    assert details[1]["r2"] >= 0  # on its own samples least squares always gains
    assert details[1]["r2_cv"] <= 0
    assert any("no branch at 1" in note for note in offer.notes)
    for result, expected in ((offer.candidates[-1].whole, False), (all_branches(planted()[0], halves(), DENSE), True)):
        net = quantized_net(result)
        graph = onnx_from_net(net, torch.zeros(2, 7, 5))
        assert any(name == "1.branch" for name, _ in net.named_modules()) == expected
        assert any(node.name.startswith("1.branch/") for node in graph.graph.node) == expected


def test_nothing_is_offered_where_rounding_changes_nothing():
    model, _ = planted()
    offer = candidates(dataclasses.replace(model, net=model.exact_net), halves(), DENSE)
    assert offer.candidates == []
    assert all("changes nothing" in detail["reason"] for detail in tried(offer))


# one block


def sums_of(x, r, layout=None, step=1):
    """Of images x, r dealt to the four parts in turn."""
    sums = BlockSums(Place(layout or Layout(True, x.shape[-1], r.shape[-1])), 4)
    for part in range(4):
        sums.update(x[part::4], r[part::4], part, step)
    return sums


def fitted(sums, config=DENSE):
    return fit_branch("dense", sums, sums.place, config)


def test_a_branch_whose_outputs_overflow_fp16_is_dropped():
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) * 500
    branch, found = fitted(sums_of(x, 300 * x))
    assert branch is None
    assert "overflow FP16" in found["reason"]
    assert fitted(sums_of(x / 500, 300 * x / 500))[0] is not None


def test_weights_no_fp16_branch_can_hold_drop_the_block_with_a_reason():
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) * 1e-6
    branch, found = fitted(sums_of(x, x * 1e7))
    assert branch is None
    assert "weights below 1000" in found["reason"]


def test_few_noisy_samples_take_the_ridge_that_serves_the_other_half_best():
    torch.manual_seed(0)
    x = torch.randn(4, 20, 24)
    sums = sums_of(x, x @ (0.1 * torch.eye(24)) + torch.randn(4, 20, 24))
    found = {
        ridges: fitted(sums, dataclasses.replace(DENSE, ridges=ridges))[1]
        for ridges in ((0.0,), (3.0,), (0.0, 3.0, 0.03))
    }
    chosen = found[0.0, 3.0, 0.03]
    assert chosen["ridge"] == 3.0
    assert chosen["r2_cv"] == found[3.0,]["r2_cv"] > found[0.0,]["r2_cv"] + 0.1
    assert chosen["r2"] == found[3.0,]["r2"] < found[0.0,]["r2"], "the kept branch is damped as the judged ones"
    exact = fitted(sums_of(x, x @ torch.randn(24, 24)), Config(forms=("dense",)))[1]
    assert exact["ridge"] == 0.0, "the paper's fit where there is no noise"


def test_official_r2_of_maps_is_about_the_mean_of_every_position():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, 4, 4, generator=generator)
    r = 3 * x + torch.randn(60, 2, 4, 4, generator=generator) + 3 * torch.randn(1, 2, 4, 4, generator=generator)
    branch, found = fitted(sums_of(x, r, Layout(False, 2, 2)))
    residual = (r - branch.branch(x)).double().square().sum()
    expected = float(1 - residual / (r - r.mean(0)).double().square().sum())
    assert found["r2_official"] == pytest.approx(expected, abs=1e-5)
    thinned = fitted(sums_of(x, r, Layout(False, 2, 2), step=3))[1]
    assert thinned["r2_official"] == pytest.approx(found["r2_official"], abs=0.02)
    of_channels = (r - r.mean((0, 2, 3), keepdim=True)).double().square().sum()
    assert found["r2"] == pytest.approx(float(1 - residual / of_channels), abs=1e-5)


# whole networks


@pytest.mark.parametrize("family", ["vit", "resnet", "mobilenet", "regnet"])
def test_every_block_is_told_of_and_what_is_kept_lowers_its_error(family):
    offer = candidates(coarse(quantized_model(family)), tiny_halves(16), ALWAYS)
    found = offer.candidates[-1].whole
    assert list(offer.details["tried"]) == list(found.structure.blocks)
    assert found.branches
    for name, detail in zip(found.structure.blocks, tried(offer), strict=True):
        assert detail["kept"] == (name in found.branches)
        if detail["kept"]:
            assert 0 < detail["r2_cv"] <= detail["r2"] <= 1
            assert detail["error_after"] < detail["error_before"]
    with torch.no_grad():
        assert quantized_net(found)(tiny_batches(1)[0]).isfinite().all()


def exact_runs(model, config):
    """(what is offered, how often each block of the exact network ran) on 32 batches."""
    exact, runs = copy.deepcopy(model.exact_net), {}
    for name in model.structure.blocks:

        def count(_block, _args, _output, name=name):
            runs[name] = runs.get(name, 0) + 1

        exact.get_submodule(name).register_forward_hook(count)
    return candidates(dataclasses.replace(model, exact_net=exact), tiny_halves(16), config), runs


def forms_of(offer):
    return {name: figures["form"] for name, figures in offer.candidates[-1].whole.branch_figures.items()}


def test_limits_that_rule_a_form_out_need_no_second_pass():
    both = dataclasses.replace(ALWAYS, forms=("shared", "dense"))
    free, _ = exact_runs(coarse(quantized_model("vit")), both)
    assert "dense" in forms_of(free).values()
    found, runs = exact_runs(coarse(quantized_model("vit")), dataclasses.replace(both, max_extra_kernels=0))
    assert set(forms_of(found).values()) == {"shared"}
    assert runs == {"blocks.0": 32, "blocks.1": 32}


def test_blocks_whose_branch_was_left_out_run_once():
    offer, runs = exact_runs(coarse(quantized_model("vit")), dataclasses.replace(ALWAYS, max_extra_kernels=1))
    (kept,) = forms_of(offer)
    (other,) = {"blocks.0", "blocks.1"} - {kept}
    assert runs == {kept: 64, other: 32}
    assert any(f"beyond a limit: dense at {other} (R2 " in note for note in offer.notes)


@pytest.mark.parametrize("forms", [("shared", "dense"), ("shared",)], ids=str)
def test_a_form_that_no_block_can_take_is_named_and_costs_nothing(forms):
    offer, runs = exact_runs(coarse(quantized_model("mobilenet")), dataclasses.replace(ALWAYS, forms=forms))
    assert any("'shared' does not apply" in note and "EfficientNet" in note for note in offer.notes)
    assert bool(offer.candidates) == bool(runs) == ("dense" in forms)
    assert set(runs.values()) <= {32}


def test_each_block_is_fitted_on_compensated_inputs_against_the_exact_block():
    model, images = coarse(quantized_model("vit")), tiny_halves(16)
    found = all_branches(model, images)
    names = found.structure.blocks
    batches = [batch for half in images for batch in half]
    inputs = block_inputs(quantized_net(found), names, batches)  # of the finished network: all branches at work
    plain = quantized_net(model)
    for name in names:
        with torch.no_grad():
            x = inputs[name]
            r = model.exact_net.get_submodule(name)(x) - plain.get_submodule(name)(x)
        weight, bias = stored_fit(x, r)
        branch = found.branches[name]
        np.testing.assert_allclose(branch.weight.flatten(1).t(), weight, rtol=2e-3, atol=1e-4)
        np.testing.assert_allclose(branch.bias, bias, rtol=2e-3, atol=1e-3)


def test_the_target_is_the_frozen_network_after_weights_were_changed():
    model, images = coarse(quantized_model("vit")), tiny_halves(16)
    changed = copy.deepcopy(model.net)
    with torch.no_grad():
        changed.get_submodule("blocks.0.mlp.fc2").bias.add_(1.0)
    plain, found = (all_branches(each, images) for each in (model, dataclasses.replace(model, net=changed)))
    assert found.exact_net is model.exact_net
    shift = found.branches["blocks.0"].bias - plain.branches["blocks.0"].bias
    torch.testing.assert_close(shift, -torch.ones_like(shift), rtol=0, atol=2e-3)  # FP16 of values near 1


def test_the_model_and_its_networks_are_untouched_and_no_hook_is_left():
    model, images = coarse(quantized_model("vit")), tiny_halves(16)
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    assert all_branches(model, images).branches
    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())
    for net in (model.net, model.exact_net):
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())
    assert not model.branches


def test_a_second_run_replaces_the_branches_of_the_first():
    model, images = coarse(quantized_model("vit")), tiny_halves(16)
    once = all_branches(model, images)
    twice = all_branches(once, images)
    assert len(once.branches) == len(twice.branches) == 2
    for name, branch in once.branches.items():
        assert torch.equal(branch.weight, twice.branches[name].weight)


def test_branches_stand_beside_blocks_on_both_sides_of_a_patch_merging():
    net, images = family_net("swin")
    batches = [torch.randn(32, *images.shape[1:]) for _ in range(4)]
    halves = [half_of(batches[:2]), half_of(batches[2:])]
    model = fold_affine(QuantModel.of("swin", net), images[:1])
    model = coarse(rounded(calibrate(model, halves, CalibrateConfig("max")), halves))
    offer = candidates(model, halves, ALWAYS)
    found = offer.candidates[-1].whole
    assert list(found.branches) == [f"layers.{stage}.blocks.{block}" for stage in (0, 1) for block in (0, 1)]
    read = block_inputs(quantized_net(found), found.branches, batches)
    for name, branch in found.branches.items():
        x = read[name]
        with torch.no_grad():
            missing = model.exact_net.get_submodule(name)(x) - quantized_net(model).get_submodule(name)(x)
        weight, bias = stored_fit(x, missing, rcond=1e-6)  # behind a norm the channels are not independent
        expected = torch.from_numpy(x.double().numpy() @ weight + bias).float()
        assert difference(expected, branch(x)) < 5e-3
        torch.testing.assert_close(branch(x), x @ branch.weight.flatten(1).t() + branch.bias)
    shared = candidates(model, halves, Config(forms=("shared", "shared_mlp"), min_r2_per_kernel=0.0))
    forms = {name: entries[0]["form"] for name, entries in shared.details["tried"].items()}
    assert set(forms.values()) == {"shared_mlp"}, "windows have their tokens in another order"
    assert all(branch.reader == "mlp.fc1" for branch in shared.candidates[-1].whole.branches.values())


class Pooling(nn.Module):
    """Returns every second token."""

    def forward(self, x):
        return x[:, ::2]


def test_a_block_that_no_branch_can_stand_beside_is_told_and_the_others_get_theirs():
    model, maps = planted(blocks=3)
    nets = [nn.Sequential(*net[:1], Pooling(), *net[1:]) for net in (model.float_net, model.net)]
    model = dataclasses.replace(QuantModel.of("chain", nets[0], chain_of(4)), net=nets[1])
    offer = candidates(model, halves(), DENSE)
    assert offer.notes[-1] == (
        "no branch at block '1' turns tokens (1, 7, 5) into (1, 4, 5): a branch needs one for one"
    )
    found = offer.candidates[-1].whole.branches
    for name, (weight, _) in zip(("0", "2", "3"), maps, strict=True):
        torch.testing.assert_close(found[name].weight.flatten(1), weight, rtol=0, atol=1e-6)


# the pieces


def test_batches_know_their_part():
    first, second = Half((Part(tokens(1)), Part(tokens(2)))), Half((Part(tokens(3)), Part(tokens(1))))
    joined = Joined([first, second])
    assert joined.part_of == [0, 1, 1, 2, 2, 2, 3]
    assert len(joined) == len(list(joined)) == 7


def test_blocks_read_on_from_what_was_kept_of_the_one_before_and_the_network_runs_once():
    runs = []
    net = nn.Sequential(nn.Tanh(), nn.Softsign(), nn.Tanh())
    net[0].register_forward_pre_hook(lambda _block, args: runs.append(args[0]))
    path, images = Carry(net, tokens(2), {"1", "2"}), tokens(2)
    for branch in (lambda call: 2 * call.x, None):
        name = "0" if branch else "1"
        for index, call in enumerate(path.calls(name)):
            path.keep(index, call.run(net.get_submodule(name)))
        path.advance(branch)
    found = [call.x for call in path.calls("2")]
    for x, image in zip(found, images, strict=True):
        torch.testing.assert_close(x, nn.functional.softsign(torch.tanh(image) + 2 * image))
    assert path.outputs == {}, "only one block's outputs are held"


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
    (nn.Sequential(nn.Tanh(), InPlace()), ("0", "1"), "block '1' edits its input"),
    (nn.Sequential(nn.Tanh(), Between(nn.ReLU(), nn.Tanh(), nn.Tanh())), ("0", "1.2"), "without calling block '1.2'"),
])  # fmt: skip
def test_blocks_that_no_branch_can_serve_are_refused_by_name(net, blocks, message):
    with pytest.raises(ValueError, match=message):
        seen_blocks(net, blocks, torch.ones(2, 3))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize(("net", "blocks"), [
    (Between(nn.ReLU(), nn.Tanh()), ("0", "1")),  # something lies between
    (Masks(), ("first", "second")),  # the second gets another mask
])  # fmt: skip
def test_a_block_that_does_not_read_on_is_told_apart(net, blocks):
    assert reads_on(seen_blocks(net, blocks, torch.ones(2, 3)), blocks) == set()
    chain = nn.Sequential(nn.Tanh(), nn.Tanh(), nn.Tanh())
    seen = seen_blocks(chain, ("0", "1", "2"), torch.ones(2, 3))
    assert reads_on(seen, ("0", "1", "2")) == {"1", "2"}
    assert reads_on(seen, ("0", "2")) == set(), "the one between gives it what it reads"


def test_a_block_behind_a_merging_gets_what_the_network_with_the_branches_before_it_gives():
    net, images = Between(nn.Tanh(), nn.Softsign()), tokens(2)
    net[0].register_forward_hook(lambda _block, args, y: y + 3 * args[0])  # stands for a branch that is attached
    path = Carry(net, images, set())
    for index, call in enumerate(path.calls("0")):
        path.keep(index, call.run(net[0]))
    path.advance(None)
    for call, image in zip(path.calls("1"), images, strict=True):
        torch.testing.assert_close(call.x, 2 * (torch.tanh(image) + 3 * image))


@pytest.mark.parametrize(("options", "message"), [
    ({"forms": ("cubic",)}, "form 'cubic' is not one of dense, shared, shared_mlp"),
    ({"rows": 0}, "rows is 0"), ({"ridges": ()}, "ridges"), ({"ridges": (0.1, -0.1)}, "numbers of at least 0"),
])  # fmt: skip
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Config(**options)


@pytest.mark.parametrize("form", ["shared", "shared_mlp"])
def test_forms_that_cost_no_kernel_compensate_too(form):
    offer = candidates(coarse(quantized_model("vit")), tiny_halves(24), dataclasses.replace(ALWAYS, forms=(form,)))
    assert set(forms_of(offer).values()) == {form}
    assert tried(offer)[0]["kernels"] == 0
    nets = [quantized_net(each) for each in (coarse(quantized_model("vit")), offer.candidates[-1].whole)]
    with torch.no_grad():
        before, after = (
            sum(float((net(x) - quantized_model("vit").float_net(x)).square().sum()) for x in tiny_batches(8, seed=77))
            for net in nets
        )
    assert after < before


# end to end


def test_held_out_error_of_four_bit_vits_falls_with_each_branch():
    """Mean over networks, of the output's squared error on images the fit has not seen, none / one / both branches."""
    errors = []
    for seed in range(4):
        model = coarse(quantized_model("vit", seed))
        found = all_branches(model, tiny_halves(24, seed=10 + seed))
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
