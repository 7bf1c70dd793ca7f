"""QwT* on tiny networks. Oracles: torch's own fake quantization, hooks on the plain forward pass, an uninterrupted run."""

import copy
import dataclasses
import functools
import itertools
import math

import pytest
import timm
import torch
from torch import nn

from calib.images.batches import Half, Part
from calib.judge.held_out import Candidate
from calib.network.qdq import quantize_dequantize, quantized_net
from calib.quant_model import QuantModel
from calib.scales.calibrate import Config as CalibrateConfig
from calib.scales.calibrate import calibrate
from calib.store.watch import UNWATCHED, Watch
from calib.structure.structure import structure_of
from compensation.star import finetune as stage
from compensation.star.finetune import Config, Training, candidates, cosine, learning_rate_of, loss_of
from compensation.star.masters import Masters
from compensation.star.minibatches import minibatches, shuffled
from compensation.star.trainable import trained_parameters, with_values
from tests.tiny import TINY, half_of, rounded, tiny_batches, tiny_halves
from tests.unit.compensation.test_branch import quantized_model
from tests.unit.compensation.test_qwt import all_branches, coarse

FAST = Config(batch=8, learning_rate=1e-3)


@functools.cache
def compensated(family="vit"):
    """A tiny model of about four bits with branches; nobody edits it."""
    return all_branches(coarse(quantized_model(family)), tiny_halves(24))


def features_model():
    """A coarse ViT without a classifier, with branches."""
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", **TINY["vit"][1], num_classes=0).eval()
    halves = tiny_halves(24)
    model = calibrate(
        QuantModel.of("features", net, structure_of(net, halves[0].parts[0].batches[0][:1])),
        halves,
        CalibrateConfig("max"),
    )
    return all_branches(coarse(rounded(model, halves)), halves)


def trained(model, halves, config=FAST, watch=UNWATCHED):
    """(the model with trained branches, the notes)."""
    (candidate,), notes, details = candidates(model, halves, config, watch)
    assert candidate == Candidate("trained branches", ((candidate.whole, None), (None, None)), candidate.whole)
    assert details == {}
    return candidate.whole, notes


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
    twin = nn.Linear(*quantized.weight.shape[::-1])
    twin.weight.data = quantized.weight.contiguous()
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
def test_the_loss_is_the_distance_of_what_the_classifier_reads(family):
    model = features_model() if family == "features" else compensated(family)
    net, images = quantized_net(model), tiny_batches(1)[0]

    def read(network):
        seen, classifier = [], network.get_classifier()
        if isinstance(classifier, nn.Identity):
            return network(images)
        handle = classifier.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        network(images)
        handle.remove()
        return seen[0]

    with torch.no_grad():
        pairs = zip(read(net), read(model.exact_net), strict=True)
        distance = sum(float((one - other).square().sum()) for one, other in pairs) / 4
        assert distance > 0
        assert float(loss_of(net, model.exact_net, images)) == pytest.approx(distance, rel=1e-5)


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
    found, notes = trained(model, tiny_halves(14), dataclasses.replace(FAST, epochs=3), watch)
    assert seen == [(step, 33) for step in range(1, 34)]  # 21 of 28 batches of 4, in 8, three times
    epochs = [sum(losses[start : start + 11]) for start in (0, 11, 22)]
    assert epochs[2] < epochs[1] < epochs[0]
    assert squared_error(found) < 0.97 * squared_error(model)
    first, last = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
    assert notes[0] == f"33 steps, loss {first:.4g} in the first tenth, {last:.4g} (other images) in the last"
    moved = [
        mine != theirs
        for name in model.branches
        for mine, theirs in zip(found.branches[name].parameters(), model.branches[name].parameters(), strict=True)
    ]
    share = torch.cat([each.flatten() for each in moved]).float().mean()
    assert notes[1] == f"learning rate 0.001 (given), {share:.1%} of the FP16 numbers moved"


@pytest.mark.parametrize("family", [*sorted(TINY), "features"])
def test_only_branches_change_and_they_hold_fp16_numbers(family):
    model = features_model() if family == "features" else compensated(family)
    before = quantized_net(model), copy.deepcopy(model.net), copy.deepcopy(model.exact_net)
    found, _ = trained(model, tiny_halves(2))
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


@pytest.mark.parametrize(("which", "part", "trains"), [(0, 0, True), (0, 1, True), (1, 0, True), (1, 1, False)])
def test_all_but_the_images_that_judge_train(which, part, trains):
    halves = tiny_halves(2)
    others = list(halves)
    parts = list(halves[which].parts)
    parts[part] = Part(tiny_batches(1, seed=9))
    others[which] = Half(tuple(parts))
    one, other = (trained(compensated(), each)[0] for each in (halves, others))
    assert same_state(quantized_net(one), quantized_net(other)) != trains


def test_nothing_to_train_is_said():
    offer = candidates(coarse(quantized_model("vit")), tiny_halves(2), FAST)
    assert offer == ([], ("nothing to train: no block has a branch",), {})


def test_a_loss_that_is_no_number_ends_the_training(losses):
    config = dataclasses.replace(FAST, learning_rate=1e6)  # beyond FP16 after one step
    offer = candidates(compensated(), tiny_halves(4), config)
    assert len(losses) == 2
    assert offer.candidates == []
    assert offer.notes[0].startswith("dropped: the loss of step 2 is ")


# interruption


class InterruptionError(Exception):
    pass


@pytest.mark.parametrize("stop_at", [3, 5, 7])
def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path, stop_at):
    """16 batches of 4: 12 train, in 6 steps an epoch; saved every 2 steps, so that the last one before 3 is repeated."""
    model, halves = compensated(), tiny_halves(8)
    config = dataclasses.replace(FAST, epochs=2, save_every=2)
    whole, notes = trained(model, halves, config)
    folder, seen = tmp_path / "deep", []

    def stop(step, _steps):
        if step == stop_at:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        candidates(model, halves, config, Watch(stop, folder))
    (file,) = folder.iterdir()
    resumed, said = trained(model, halves, config, Watch(lambda step, _steps: seen.append(step), folder))
    assert seen == list(range(stop_at // 2 * 2 + 1, 13))
    assert same_state(quantized_net(resumed), quantized_net(whole))
    assert said == (*notes, f"went on from checkpoint '{file}'")
    assert not list(folder.iterdir())


@pytest.mark.parametrize("change", [
    lambda run: run | {"config": dataclasses.replace(FAST, save_every=1, learning_rate=2e-3)},
    lambda run: run | {"model": compensated("resnet")},
    lambda run: run | {"halves": tiny_halves(2, seed=5)},
], ids=["options", "model", "images"])  # fmt: skip
def test_another_run_does_not_go_on_from_its_checkpoint(tmp_path, change):
    def stop(_step, _steps):
        raise InterruptionError

    run = {"model": compensated(), "halves": tiny_halves(2), "config": dataclasses.replace(FAST, save_every=1)}
    with pytest.raises(InterruptionError):
        candidates(**run, watch=Watch(stop, tmp_path))
    kept, seen = list(tmp_path.iterdir()), []
    candidates(**change(run), watch=Watch(lambda step, _steps: seen.append(step), tmp_path))
    assert seen[0] == 1
    assert list(tmp_path.iterdir()) == kept
    seen.clear()
    candidates(**run, watch=Watch(lambda step, _steps: seen.append(step), tmp_path))
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


def test_minibatches_take_every_image_once_whatever_the_batches_were():
    images = [torch.full((size, 3, 2, 2), 10.0 * size) + torch.arange(size)[:, None, None, None] for size in (4, 3)]
    found = list(minibatches(images, 3, 16, seed=0))
    assert [batch.shape for batch in found] == [(3, 3, 2, 2), (3, 3, 2, 2), (1, 3, 2, 2)]
    pixels = torch.cat(found)[:, 0, 0, 0].tolist()
    assert sorted(pixels) == [30, 31, 32, 40, 41, 42, 43] != pixels


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


def test_the_rate_that_ran_is_told():
    _, notes = trained(compensated(), tiny_halves(2), Config(batch=8))
    assert "learning rate 1e-07 (QwT, appendix A)" in notes[1]


def test_the_rate_falls_from_the_start_to_zero():
    rates = [cosine(2.0, step, 10) for step in range(11)]
    assert rates[0] == 2
    assert rates[5] == pytest.approx(1)
    assert rates[10] == pytest.approx(0)
    assert rates == sorted(rates, reverse=True)


def test_names_of_the_network_lead_back_to_branches():
    model = compensated()
    names = trained_parameters(quantized_net(model), model)
    assert set(names) == {f"blocks.{block}.branch.{part}" for block in (0, 1) for part in ("weight", "bias")}
    found = with_values(model, {name: torch.full_like(value, 2.0) for name, value in names.items()})
    state = quantized_net(found).state_dict()
    assert all(torch.equal(state[name], torch.full_like(state[name], 2.0)) for name in names)


@pytest.mark.parametrize(("options", "message"), [
    ({"epochs": 0}, "epochs is 0"), ({"batch": 0}, "batch is 0"), ({"window": 0}, "window is 0"),
    ({"save_every": 0}, "save_every is 0"), ({"learning_rate": -1.0}, "learning_rate is -1"),
    ({"learning_rate": math.nan}, "learning_rate is nan"),
])  # fmt: skip
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Config(**options)


def test_the_images_that_train_are_counted_one_by_one():
    first, second = half_of(tiny_batches(2, batch=3)), Half((Part(tiny_batches(1, batch=2)), Part(tiny_batches(1))))
    images = Training([first, second])
    assert images.count == 8
    assert [len(batch) for batch in images] == [3, 3, 2]
