"""QwT* on tiny networks. Oracles: torch's own fake quantization, hooks on the plain forward pass, an uninterrupted run."""

import copy
import dataclasses
import functools
import itertools
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from calib.errors import UserError
from calib.families import family_of
from calib.methods import rtn
from calib.network.qdq import dequantize_weight, quantize_dequantize, quantized_net
from calib.quant_model import QuantModel
from calib.scales.calibrate import Config as CalibrateConfig
from calib.scales.calibrate import calibrate
from calib.store.watch import Watch
from compensation.qwt import compensate
from compensation.star import finetune as stage
from compensation.star.finetune import Config, cosine, finetune, learning_rate_of, loss_of, split_of
from compensation.star.masters import Masters
from compensation.star.minibatches import Minibatch, minibatches, shuffled
from compensation.star.trainable import classifier_layers, trained_parameters, with_values, zero_branches
from tests.tiny import TINY, tiny_batches
from tests.unit.compensation.test_branch import quantized_model
from tests.unit.compensation.test_qwt import ALWAYS, coarse, halves

FAST = Config(batch=8, learning_rate=1e-3)
IMAGES = 48  # batches of four


@functools.cache
def compensated(family="vit"):
    """A tiny model of about four bits with a branch at every block; nobody edits it."""
    return compensate(coarse(quantized_model(family)), halves(tiny_batches(48)), ALWAYS)


def classes(model, count):
    """What the float network sees in the images of `tiny_batches(count)`."""
    with torch.no_grad():
        return [int(each) for batch in tiny_batches(count) for each in model.float_net(batch).argmax(1)]


def features_model():
    """A coarse ViT without a classifier."""
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", **TINY["vit"][1], num_classes=0).eval()
    model = calibrate(QuantModel.of("features", net, family_of(net)), [tiny_batches()], CalibrateConfig("max"))
    return coarse(rtn.reduce_error(model, [], rtn.Config()))


def same_state(first, second, *but):
    """Whether two networks hold the same numbers, outside the names that contain one of `but`."""
    one, other = first.state_dict(), second.state_dict()
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one if not any(part in name for part in but))


def squared_error(model, seed=77):
    """Of the network's output, on images of a seed of their own."""
    net = quantized_net(model)
    with torch.no_grad():
        return sum(float((net(x) - model.float_net(x)).square().sum()) for x in tiny_batches(8, seed=seed))


# gradients


def test_rounding_passes_gradients_and_clipping_stops_them():
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(4, 500, generator=generator)
    x[0, :4] = torch.tensor([127.4, 127.6, -128.4, -128.6]) * 0.02  # the ends of the range that rounds to the grid
    upstream = torch.randn(x.shape, generator=generator)
    scale = torch.tensor(0.02)

    ours = x.clone().requires_grad_()
    quantize_dequantize(ours, scale).backward(upstream)
    by_hand = torch.where((x / scale > -128.5) & (x / scale < 127.5), upstream, 0.0)
    assert torch.equal(ours.grad, by_hand)
    assert ours.grad[0, :4].ne(0).tolist() == [True, False, True, False]
    assert 0.2 < ours.grad.eq(0).float().mean() < 0.6

    torchs = x.clone().requires_grad_()
    torch.fake_quantize_per_tensor_affine(torchs, 0.02, 0, -128, 127).backward(upstream)
    assert torch.equal(ours.grad, torchs.grad)


def test_gradients_of_a_quantized_layer_are_those_of_its_float_twin_where_nothing_clips():
    model = quantized_model("vit")
    quantized = quantized_net(model).get_submodule("blocks.0.mlp.fc1")
    twin = nn.Linear(quantized.weight.shape[0], quantized.weight.shape[1])
    twin.weight.data = dequantize_weight(quantized.weight, quantized.weight_scale, 1).t()
    x = torch.randn(3, twin.in_features) * quantized.input_scale * 30
    upstream = torch.randn(3, twin.out_features)
    found = []
    for layer in (quantized, twin):
        leaf = x.clone().requires_grad_()
        layer(leaf).backward(upstream)
        found.append(leaf.grad)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_what_runs_is_the_master_in_fp16_and_small_steps_add_up():
    running = nn.Parameter(torch.tensor([1.0, 0.1, -3.0]))
    masters = Masters({"w": running})
    assert torch.equal(running, torch.tensor([1.0, 0.1, -3.0]).half().float())
    rate, seen = 1e-4, []  # a tenth of the distance of FP16 numbers below 1
    for _ in range(20):
        running.sum().backward()
        masters.step(rate)
        assert running.grad is None
        seen.append(float(running.detach()[0]))
    expected = torch.tensor([1.0, 0.1, -3.0]) - 20 * rate  # Adam's step is its rate where the gradient is constant
    torch.testing.assert_close(masters.masters["w"], expected, rtol=0, atol=5e-6)  # 20 roundings near 3
    assert torch.equal(running, masters.masters["w"].half().float())
    assert 2 < len(set(seen)) < 10  # most steps are too small to be seen, none is lost


@pytest.mark.parametrize("family", [*sorted(TINY), "features"])
def test_the_loss_compares_penultimate_features_and_logits_with_labels(family):
    model = features_model() if family == "features" else coarse(quantized_model(family))
    net, images = quantized_net(model), tiny_batches(1)[0]

    def plain(network):
        """(what the last layer reads, what comes out)."""
        seen, layers = [], classifier_layers(network)
        if not layers:
            return network(images), None
        handle = network.get_submodule(layers[0]).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        output = network(images)
        handle.remove()
        return seen[0], output

    with torch.no_grad():
        (feature, logits), (target, _) = plain(net), plain(model.exact_net)
        distance = sum(float((one - other).square().sum()) for one, other in zip(feature, target, strict=True)) / 4
        assert distance > 0
        assert float(loss_of(net, model.exact_net, Minibatch(images, None), 1.0)) == pytest.approx(distance, rel=1e-5)
        if family == "features":
            return
        labels = torch.arange(4)
        entropy = -logits.log_softmax(1)[range(4), range(4)].mean()
        found = loss_of(net, model.exact_net, Minibatch(images, labels), 0.5)
        assert float(found) == pytest.approx(float(entropy) + 0.5 * distance, rel=1e-5)
        torch.testing.assert_close(entropy, F.cross_entropy(logits, labels))


# training


@pytest.fixture
def losses(monkeypatch):
    """Those of the steps, as they come."""
    seen, train = [], stage._train

    def recorded(*args):
        for loss in train(*args):
            seen.append(loss)
            yield loss

    monkeypatch.setattr(stage, "_train", recorded)
    return seen


def test_loss_falls_and_images_never_seen_gain(losses):
    model, seen = compensated(), []
    watch = Watch(lambda *step: seen.append(step))
    found = finetune(model, tiny_batches(IMAGES), dataclasses.replace(FAST, epochs=3), watch=watch)
    assert seen == [(step, 63) for step in range(1, 64)]  # 42 batches of 4, in 8, three times
    epochs = [sum(losses[start : start + 21]) for start in (0, 21, 42)]
    assert epochs[2] < epochs[1] < epochs[0]
    assert squared_error(found) < 0.95 * squared_error(model)
    record = found.history[-1]
    assert record.stage == "qwt_star"
    assert record.sqnr_after_db > record.sqnr_before_db + 0.1
    assert record.notes[0].startswith("network output")
    first, last = sum(losses[:6]) / 6, sum(losses[-6:]) / 6
    assert record.notes[1] == f"63 steps, loss {first:.4g} in the first tenth, {last:.4g} (other images) in the last"
    moved = [
        mine != theirs
        for name in model.branches
        for mine, theirs in zip(found.branches[name].parameters(), model.branches[name].parameters(), strict=True)
    ]
    share = torch.cat([each.flatten() for each in moved]).float().mean()
    assert record.notes[2] == f"learning rate 0.001 (given), {share:.1%} of the FP16 numbers moved"


@pytest.mark.parametrize("family", sorted(TINY))
def test_only_branches_change_without_labels_and_they_hold_fp16_numbers(family, monkeypatch):
    monkeypatch.setattr(stage, "MARGIN_DB", -math.inf)  # whatever comes out is kept
    model = compensated(family)
    before = quantized_net(model), copy.deepcopy(model.net), copy.deepcopy(model.exact_net)
    found = finetune(model, tiny_batches(8), FAST)
    assert same_state(quantized_net(found), before[0], ".branch.")
    assert found.net is model.net
    assert found.quantizers is model.quantizers
    assert same_state(model.net, before[1])
    assert same_state(model.exact_net, before[2])
    assert same_state(quantized_net(model), before[0])  # the input's branches, too
    assert found.branches.keys() == model.branches.keys()
    for name, branch in found.branches.items():
        for mine, theirs in zip(branch.parameters(), model.branches[name].parameters(), strict=True):
            assert not torch.equal(mine, theirs)
            assert torch.equal(mine, mine.half().float())
            assert not mine.requires_grad
    integers = [value for value in quantized_net(found).state_dict().values() if value.dtype == torch.int8]
    assert len(integers) == len(model.quantized_layers)


@pytest.mark.parametrize("family", sorted(TINY))
def test_labels_train_the_classifier_too(family, monkeypatch):
    monkeypatch.setattr(stage, "MARGIN_DB", -math.inf)
    model = compensated(family)
    found = finetune(model, tiny_batches(8), FAST, classes(model, 8))
    (head,) = classifier_layers(model.net)
    assert same_state(found.net, model.net, head)
    weight = found.net.get_submodule(head).weight
    assert not torch.equal(weight, model.net.get_submodule(head).weight)
    assert torch.equal(weight, weight.half().float())
    assert same_state(quantized_net(found), quantized_net(model), ".branch.", head)
    assert found.float_net is model.float_net
    assert found.exact_net is model.exact_net


def test_labels_lower_the_cross_entropy_of_images_that_do_not_train(monkeypatch):
    model, config = compensated("resnet"), dataclasses.replace(FAST, epochs=3)
    labels, held_out = classes(model, IMAGES), torch.cat(tiny_batches(IMAGES)[42:46])
    strict = finetune(model, tiny_batches(IMAGES), config, labels)
    assert strict.history[-1].notes[0].startswith("dropped")  # the output left the float network's, and that decides
    monkeypatch.setattr(stage, "MARGIN_DB", -math.inf)
    found = finetune(model, tiny_batches(IMAGES), config, labels)
    with torch.no_grad():
        before, after = (
            float(-quantized_net(each)(held_out).log_softmax(1)[range(16), labels[168:184]].mean())
            for each in (model, found)
        )
    assert after < 0.5 * before
    note = f"cross-entropy {after:.3f} against {before:.3f} on images held out"
    assert found.history[-1].notes[3] == strict.history[-1].notes[3] == note


def test_the_cross_entropy_told_is_of_the_images_that_judge():
    model, labels = compensated(), torch.randint(1000, (64,), generator=torch.Generator().manual_seed(0))
    found = finetune(model, tiny_batches(16), dataclasses.replace(FAST, learning_rate=1e-9), labels.tolist())
    with torch.no_grad():
        logits = quantized_net(model)(torch.cat(tiny_batches(16)[14:]))
    before = float(-logits.log_softmax(1)[range(8), labels[56:]].mean())
    assert f"against {before:.3f} on images held out" in found.history[-1].notes[3]


def test_both_classifiers_of_a_distilled_network_are_found_and_none_where_there_is_none():
    torch.manual_seed(0)
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", **TINY["vit"][1])
    assert classifier_layers(distilled) == ("head", "head_dist")
    assert classifier_layers(features_model().net) == ()


def test_a_network_of_features_is_trained_on_its_output():
    found = finetune(features_model(), tiny_batches(IMAGES), dataclasses.replace(FAST, all_blocks=True))
    assert len(found.branches) == 2
    assert found.history[-1].details["kept"].keys() == found.branches.keys()
    assert all(figures["bytes"] == 2 * (48 * 48 + 48) for figures in found.history[-1].details["kept"].values())  # FP16
    assert found.history[-1].sqnr_after_db > found.history[-1].sqnr_before_db


# zero-init entry


@pytest.mark.parametrize("family", sorted(TINY))
def test_branches_of_zeros_change_nothing_and_learn(family):
    model, images = coarse(quantized_model(family)), tiny_batches(IMAGES)
    zeros = zero_branches(model, images[0])
    assert tuple(zeros) == model.family.blocks(model.net)
    begun = dataclasses.replace(model, branches=zeros)
    with torch.no_grad():
        assert torch.equal(quantized_net(begun)(images[0]), quantized_net(model)(images[0]))
    found = finetune(model, images, dataclasses.replace(FAST, all_blocks=True))
    assert tuple(found.branches) == tuple(zeros)
    assert all(branch.weight.abs().max() > 0 for branch in found.branches.values())
    assert squared_error(found) < squared_error(model)
    assert found.history[-1].sqnr_before_db < found.history[-1].sqnr_after_db


def test_branches_that_are_there_keep_their_numbers_beside_those_of_zeros():
    model = compensated()
    first = dataclasses.replace(model, branches={"blocks.0": model.branches["blocks.0"]})
    assert tuple(zero_branches(first, tiny_batches(1)[0])) == ("blocks.1",)
    found = finetune(first, tiny_batches(4), dataclasses.replace(FAST, learning_rate=1e-12, all_blocks=True))
    assert found.branches is first.branches  # too little for a gain: no zeros stay behind
    assert found.history[-1].details["kept"] == {}


def test_nothing_to_train_is_said():
    model = coarse(quantized_model("vit"))
    found = finetune(model, tiny_batches(4), FAST)
    assert found.history[-1].notes == ("nothing to train: no block has a branch",)
    assert not found.branches


# never worse


def test_what_does_not_help_is_dropped():
    model = compensated()
    found = finetune(model, tiny_batches(8), dataclasses.replace(FAST, learning_rate=10.0), classes(model, 8))
    record = found.history[-1]
    assert record.notes[0].startswith("dropped: network output")
    assert record.sqnr_after_db == record.sqnr_before_db
    assert found.branches is model.branches
    assert found.net is model.net


def test_a_gain_that_may_be_chance_is_dropped():
    found = finetune(compensated(), tiny_batches(8), dataclasses.replace(FAST, learning_rate=1e-9))
    assert found.history[-1].notes[0].startswith("dropped")
    assert found.branches is compensated().branches


def test_a_loss_that_is_no_number_ends_the_training(losses):
    model = compensated()
    config = dataclasses.replace(FAST, learning_rate=1e6)  # beyond FP16 after one step
    found = finetune(model, tiny_batches(8), config)
    assert len(losses) == 2
    assert "the loss of step 2 is " in found.history[-1].notes[0]
    assert found.branches is model.branches


def test_the_last_images_judge_and_do_not_train(monkeypatch):
    model, images = compensated(), tiny_batches(16)
    altered = [*images[:14], *(torch.zeros_like(each) for each in images[14:])]
    monkeypatch.setattr(stage, "MARGIN_DB", -math.inf)
    one, other = (finetune(model, each, FAST) for each in (images, altered))
    assert same_state(quantized_net(one), quantized_net(other))
    assert one.history[-1].sqnr_after_db != other.history[-1].sqnr_after_db
    nets = quantized_net(model), quantized_net(one)
    for net, found in zip(nets, (one.history[-1].sqnr_before_db, one.history[-1].sqnr_after_db), strict=True):
        with torch.no_grad():
            x = torch.cat(images[14:])
            exact = model.float_net(x)
            expected = 10 * torch.log10(exact.square().sum() / (net(x) - exact).square().sum())
        assert found == pytest.approx(float(expected), abs=1e-3)


# interruption


class InterruptionError(Exception):
    pass


@pytest.mark.parametrize("stop_at", [3, 5, 9])
def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path, stop_at):
    """20 batches of 4: 18 train, in 9 steps an epoch; saved every 2 steps, so that the last one before 3 is repeated."""
    model, images = compensated(), tiny_batches(20)
    config = dataclasses.replace(FAST, epochs=2, save_every=2)
    labels = classes(model, 20)
    whole = finetune(model, images, config, labels)
    folder, seen = tmp_path / "deep", []

    def stop(step, _steps):
        if step == stop_at:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        finetune(model, images, config, labels, Watch(stop, folder))
    (file,) = folder.iterdir()
    resumed = finetune(model, images, config, labels, Watch(lambda step, _steps: seen.append(step), folder))
    assert seen == list(range(stop_at // 2 * 2 + 1, 19))
    assert same_state(quantized_net(resumed), quantized_net(whole))
    *notes, entropy = whole.history[-1].notes
    assert resumed.history[-1].notes == (*notes, f"went on from checkpoint '{file}'", entropy)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("change", [
    lambda run: run | {"config": dataclasses.replace(FAST, save_every=1, learning_rate=2e-3)},
    lambda run: run | {"model": compensated("resnet")},
    lambda run: run | {"images": tiny_batches(8, seed=5)},
    lambda run: run | {"labels": classes(compensated(), 8)},
], ids=["options", "model", "images", "labels"])  # fmt: skip
def test_another_run_does_not_go_on_from_its_checkpoint(tmp_path, change):
    def stop(_step, _steps):
        raise InterruptionError

    run = {"model": compensated(), "images": tiny_batches(8), "config": dataclasses.replace(FAST, save_every=1)}
    with pytest.raises(InterruptionError):
        finetune(**run, watch=Watch(stop, tmp_path))
    kept, seen = list(tmp_path.iterdir()), []
    finetune(**change(run), watch=Watch(lambda step, _steps: seen.append(step), tmp_path))
    assert seen[0] == 1
    assert list(tmp_path.iterdir()) == kept
    seen.clear()
    finetune(**run, watch=Watch(lambda step, _steps: seen.append(step), tmp_path))
    assert seen[0] == 2


# the order of the images


def test_every_item_comes_once_in_an_order_of_the_seed():
    orders = {seed: list(shuffled(range(50), 64, seed)) for seed in range(3)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()} | {tuple(range(50))}) == 4
    assert list(shuffled(range(50), 64, 1)) == orders[1]
    assert list(shuffled(range(9), 1, 0)) == list(range(9))
    assert all(item < place + 5 for place, item in enumerate(shuffled(range(50), 5, 0)))


def test_every_order_of_few_items_is_as_likely():
    counts = dict.fromkeys(itertools.permutations(range(3)), 0)
    for seed in range(1200):
        counts[tuple(shuffled(range(3), 3, seed))] += 1
    assert all(140 < count < 260 for count in counts.values()), counts  # 200 +- 4.6 standard deviations


def test_minibatches_keep_images_and_labels_together():
    images = [torch.full((size, 3, 2, 2), 0.0) + torch.arange(size)[:, None, None, None] + 10 * size for size in (4, 3)]
    labels = [40, 41, 42, 43, 30, 31, 32]
    found = list(minibatches(images, labels, 3, 16, seed=0))
    assert [len(each.images) for each in found] == [3, 3, 1]
    pixels = torch.cat([each.images for each in found])[:, 0, 0, 0]
    assert torch.equal(pixels.long(), torch.cat([each.labels for each in found]))
    assert sorted(pixels.tolist()) == sorted(labels)
    assert all(each.labels is None for each in minibatches(images, None, 3, 16, seed=0))


# options


@pytest.mark.parametrize(("name", "rate"), [
    ("vit_base_patch16_224", 1e-7), ("deit_small_patch16_224", 5e-6), ("deit_small_distilled_patch16_224", 5e-6),
    ("swin_tiny_patch4_window7_224", 5e-6), ("resnet50", 1e-5), ("mobilenetv2_100", 1e-5), ("regnetx_002", 1e-5),
])  # fmt: skip
def test_the_papers_rate_is_chosen_by_architecture(name, rate):
    net = nn.Identity()
    net.pretrained_cfg = {"architecture": name}
    found, why = learning_rate_of(dataclasses.replace(compensated(), float_net=net))
    assert found == rate
    assert ("none published" in why) == name.startswith(("mobilenet", "regnet"))


def test_the_rate_that_ran_is_recorded():
    found = finetune(compensated(), tiny_batches(4), Config(batch=8))
    assert found.history[-1].config["learning_rate"] == 1e-7
    assert "learning rate 1e-07 (QwT, appendix A)" in found.history[-1].notes[2]


def test_the_rate_falls_from_the_start_to_zero():
    rates = [cosine(2.0, step, 10) for step in range(11)]
    assert rates[0] == 2
    assert rates[5] == pytest.approx(1)
    assert rates[10] == pytest.approx(0)
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(("batches", "share", "expected"), [(32, 0.125, 28), (2, 0.125, 1), (3, 0.9, 1), (10, 0.1, 9)])
def test_some_batches_train_and_some_judge(batches, share, expected):
    split = split_of(range(batches), 16, share)
    assert (split.batches, split.count) == (expected, expected * 16)
    assert list(split.training()) == list(range(expected))
    assert split.held_out() == list(range(expected, batches))[:4]


def test_names_of_the_network_lead_back_to_branches_and_classifier():
    model = compensated()
    names = trained_parameters(quantized_net(model), model, True)
    assert set(names) == {
        *(f"blocks.{block}.branch.{part}" for block in (0, 1) for part in ("weight", "bias")),
        "head.weight", "head.bias",
    }  # fmt: skip
    found = with_values(model, {name: torch.full_like(value, 2.0) for name, value in names.items()})
    state = quantized_net(found).state_dict()
    assert all(torch.equal(state[name], torch.full_like(state[name], 2.0)) for name in names)


@pytest.mark.parametrize(("options", "message"), [
    ({"epochs": 0}, "epochs is 0"), ({"batch": 0}, "batch is 0"), ({"window": 0}, "window is 0"),
    ({"save_every": 0}, "save_every is 0"), ({"learning_rate": -1.0}, "learning_rate is -1"),
    ({"feature_weight": math.nan}, "feature_weight is nan"), ({"held_out": 0.0}, "held_out is 0"),
    ({"held_out": 1.0}, "held_out is 1"),
])  # fmt: skip
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Config(**options)


@pytest.mark.parametrize(("labels", "message"), [
    ([0] * 11, "11 labels do not fit 4 batches of 4 images"), ([0] * 17, "17 labels do not fit"),
    ([0] * 15 + [1000], r"label 1000 is no class of the network: expected 0\.\.999"), ([-1] * 16, "label -1"),
])  # fmt: skip
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(UserError, match=message):
        finetune(compensated(), tiny_batches(4), FAST, labels)


def test_labels_for_features_and_a_single_batch_are_refused():
    with pytest.raises(UserError, match="without a classifier"):
        finetune(features_model(), tiny_batches(4), FAST, [0] * 16)
    with pytest.raises(UserError, match="single batch"):
        finetune(compensated(), tiny_batches(1), FAST)
