"""Thresholds judged by what their error does to the network's output."""

import pytest
import torch
from torch import nn

from calib.families import family_of
from calib.quant_model import QuantModel
from calib.quantizer import qparams_from_amax
from calib.scales.calibrate import _fold_scales, _observe
from calib.scales.channel_scale import FoldScale
from calib.scales.equalise import Config as EqualiseConfig
from calib.scales.equalise import equalise
from calib.scales.threshold_search import PER_LAYER, Judge, candidates, rounded_inputs, search
from calib.statistics.observers import Histogram
from tests.tiny import tiny_batches, tiny_model, tiny_net


def histogram_of(x: torch.Tensor) -> Histogram:
    histogram = Histogram()
    histogram.update(x)
    return histogram


def judged(model, folds):
    """(judge, candidates by fold and layer)."""
    observed = [_observe(model.net, model.layers, batches, model.layers) for batches in folds]
    offers = [{name: candidates(found) for name, found in fold.histograms.items()} for fold in observed]
    images = [torch.cat(folds[index - 1]) for index in range(len(folds))]
    return Judge(model, [_fold_scales(model, fold.extremes) for fold in observed], images), offers


def by_hand(model, thresholds, images):
    """Noise of the output when the inputs of these layers round."""
    grids = {name: qparams_from_amax(torch.tensor(amax)) for name, amax in thresholds.items()}
    hooks = [
        model.net.get_submodule(name).register_forward_pre_hook(lambda _m, x, p=grid: (p.fake_quantize(x[0]),))
        for name, grid in grids.items()
    ]
    with torch.no_grad():
        found = model.net(images)
        for hook in hooks:
            hook.remove()
        return float((found - model.net(images)).square().sum()), float(model.net(images).square().sum())


def test_rounded_inputs_rounds_the_input_and_leaves_no_hook():
    net, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    grid = qparams_from_amax(torch.tensor(1.0))
    with torch.no_grad(), rounded_inputs(net, {"0": grid.fake_quantize}):
        found = net(x)
    torch.testing.assert_close(found, net[0](grid.fake_quantize(x)).detach())
    assert not net[0]._forward_pre_hooks


def test_the_judge_measures_the_output_on_the_other_folds_images():
    model = tiny_model("vit")
    judge, offers = judged(model, [tiny_batches(2, seed=1), tiny_batches(2, seed=2)])
    thresholds = [{name: offer["max"] for name, offer in of_fold.items()} for of_fold in offers]
    noise, signal = (
        sum(parts)
        for parts in zip(*(by_hand(model, *pair) for pair in zip(thresholds, judge.images, strict=True)), strict=True)
    )
    assert judge.db(thresholds) == pytest.approx(10 * torch.tensor(signal / noise).log10().item(), abs=1e-3)


def test_the_best_for_a_layer_makes_the_least_noise_at_the_output():
    model = tiny_model("vit")
    judge, offers = judged(model, [tiny_batches(2, seed=1), tiny_batches(2, seed=2)])
    for name, foretold in judge.alone(offers).items():
        noise = {
            candidate: sum(
                by_hand(model, {name: offers[fold][name][candidate]}, judge.images[fold])[0] for fold in (0, 1)
            )
            for candidate in foretold
        }
        chosen = min(foretold, key=lambda candidate: foretold[candidate])
        assert noise[chosen] < 1.6 * min(noise.values()), name  # few random vectors: 2 dB


class Lone(nn.Module):
    """Two layers; the second reads a channel that nothing follows."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight.data[:, 0] = 0

    def forward(self, x):
        return self.second(self.first(x))


def test_a_layer_clips_an_outlier_that_carries_nothing_and_keeps_one_that_does():
    torch.manual_seed(0)
    net = Lone().requires_grad_(False)
    net.first.weight.data[0] *= 100
    model = QuantModel.of("lone", net, family_of(tiny_net("vit")))
    folds = [[torch.randn(64, 8)], [torch.randn(64, 8)]]
    for carries in (False, True):
        net.second.weight.data[:, 0] = float(carries)
        judge, offers = judged(model, folds)
        noise = judge.alone(offers)["second"]
        chosen = min(noise, key=lambda candidate: noise[candidate])
        thresholds = offers[0]["second"]
        if carries:
            assert thresholds[chosen] > 0.9 * thresholds["max"]
        else:
            assert thresholds[chosen] == min(thresholds.values()) < thresholds["max"]
        assert PER_LAYER in search(judge, offers)[1]


def test_layers_that_another_photograph_exceeds_get_a_margin():
    model = tiny_model("resnet")
    same = tiny_batches(2, seed=1)
    judge, offers = judged(model, [same, [batch * 2 for batch in same]])
    # the smaller fold's thresholds clip the larger one's images
    alone = judge.alone([offers[0], offers[0]])
    margins = [min(found, key=lambda candidate, of=found: of[candidate]) for found in alone.values()]
    assert sum(margin in ("max x1.6", "max x2", "max x2.5") for margin in margins) > len(margins) / 2


def test_equalised_folds_are_new_to_each_other():
    model = tiny_model("vit")
    folds = [tiny_batches(2, seed=1), tiny_batches(2, seed=2)]
    judge, _ = judged(equalise(model, folds, EqualiseConfig(exponents=(0.9,))), folds)
    assert any(scale.widening != 1 or bool((scale.factor != 1).any()) for scale in judge.scales[0].values())
    plain, _ = judged(model, folds)
    assert all(scale.widening == 1 and bool((scale.factor == 1).all()) for scale in plain.scales[0].values())
    assert isinstance(plain.scales[0]["blocks.0.attn.qkv"], FoldScale)
