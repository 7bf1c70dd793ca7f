"""Clipping thresholds, by what their error does to the network's output."""

import pytest
import torch
from torch import nn

from calib.images.batches import spread_with_sources
from calib.quant_model import QuantModel
from calib.quantizer import qparams_from_amax
from calib.scales.calibrate import _fold_scales, _observe
from calib.scales.channel_scale import FoldScale
from calib.scales.equalise import Config as EqualiseConfig
from calib.scales.equalise import equalise
from calib.scales.threshold_search import (
    PER_LAYER,
    RoundedInputs,
    better_than,
    candidates,
    least,
    rounded_inputs,
    search,
    together,
)
from calib.statistics.observers import Histogram
from calib.structure.layers import Layer
from calib.structure.structure import Structure
from tests.tiny import half_of, tiny_batches, tiny_halves, tiny_model


def histogram_of(x: torch.Tensor) -> Histogram:
    histogram = Histogram()
    histogram.update(x)
    return histogram


def inputs_of(model, halves):
    """(rounded inputs, candidates by half and layer); every image of the other half chooses and judges."""
    observed = [_observe(model.net, model.layers, half, model.layers) for half in halves]
    offers = [{name: candidates(found) for name, found in half.histograms.items()} for half in observed]
    images = [[spread_with_sources(part, 99) for part in halves[index - 1].parts] for index in range(len(halves))]
    return RoundedInputs(model, [_fold_scales(model, half.extremes) for half in observed], images, images), offers


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


def test_errors_are_those_of_the_output_on_the_other_half():
    model = tiny_model("vit")
    inputs, offers = inputs_of(model, tiny_halves(2))
    thresholds = [{name: offer["max"] for name, offer in of_half.items()} for of_half in offers]
    found = inputs.errors(inputs.judge, [1], [thresholds])
    noise, signal = (
        sum(parts)
        for parts in zip(*(by_hand(model, thresholds[half], inputs.judge[half][1][0]) for half in (0, 1)), strict=True)
    )
    assert found.db(0) == pytest.approx(10 * torch.tensor(signal / noise).log10().item(), abs=1e-3)


def test_the_best_for_a_layer_makes_the_least_noise_at_the_output():
    model = tiny_model("vit")
    inputs, offers = inputs_of(model, tiny_halves(2))
    for part, of_part in enumerate(inputs.alone(offers)):
        for name, foretold in of_part.items():
            noise = {
                candidate: sum(
                    by_hand(model, {name: offers[half][name][candidate]}, inputs.choose[half][part][0])[0]
                    for half in (0, 1)
                )
                for candidate in foretold
            }
            chosen = least(foretold)
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
    torch.manual_seed(4)  # a draw at which some rule clips: at others all rules agree on the maximum
    net = Lone().requires_grad_(False)
    net.first.weight.data[0] *= 100
    model = QuantModel.of("lone", net, Structure("Lone", {name: Layer(name) for name in ("first", "second")}))
    halves = [half_of([torch.randn(32, 8), torch.randn(32, 8)]) for _ in range(2)]
    for carries in (False, True):
        net.second.weight.data[:, 0] = float(carries)
        inputs, offers = inputs_of(model, halves)
        picks, gain, text = search(inputs, offers)
        thresholds = offers[0]["second"]
        if carries:
            assert thresholds[picks["second"]] > 0.9 * thresholds["max"]
        else:
            noise = inputs.alone(offers)[0]["second"]
            assert thresholds[least(noise)] == min(thresholds.values()) < thresholds["max"]
        assert PER_LAYER in text
        assert (set(picks.values()) == {picks["first"]}) or gain.holds  # one rule for all, unless the judge says so


def test_layers_that_another_source_image_exceeds_get_a_margin():
    model = tiny_model("resnet")
    same = tiny_batches(2, seed=1)
    inputs, offers = inputs_of(model, [half_of(same), half_of([batch * 2 for batch in same])])
    # the smaller half's thresholds clip the larger one's images
    for of_part in inputs.alone([offers[0], offers[0]]):
        margins = [least(found) for found in of_part.values()]
        assert sum(margin in ("max x1.6", "max x2", "max x2.5") for margin in margins) > len(margins) / 2


def test_thresholds_by_layer_that_do_not_hold_on_the_images_that_judge_are_dropped(monkeypatch):
    """What is picked by layer is the worst candidate of every layer: the best rule stays."""
    model = tiny_model("vit")
    inputs, offers = inputs_of(model, tiny_halves(2))
    right = inputs.alone(offers)
    wrong = [
        {name: {each: 1 / noise for each, noise in found.items()} for name, found in part.items()} for part in right
    ]
    monkeypatch.setattr(inputs, "alone", lambda _: wrong)
    picks, gain, text = search(inputs, offers)
    assert len(set(picks.values())) == 1
    assert gain.after_db == gain.before_db
    assert text.startswith(f"by '{next(iter(picks.values()))}' (")
    assert f"{PER_LAYER} -" in text  # how much it would have lost


def test_the_noise_of_a_part_is_kept_by_source_image():
    model = tiny_model("vit")
    inputs, offers = inputs_of(model, tiny_halves(2))
    apart = inputs.alone(offers)
    for of_half in (*inputs.choose, *inputs.judge):
        for images, sources in of_half:
            sources[:] = [0] * len(images)  # crops of one source image
    together = inputs.alone(offers)
    for one, other in zip(apart, together, strict=True):
        for name, found in one.items():
            for candidate, noise in found.items():
                assert (len(noise), len(other[name][candidate])) == (
                    8,
                    2,
                )  # 4 images of each half, a source each or one
                torch.testing.assert_close(noise.sum(), other[name][candidate].sum())


def test_a_layer_leaves_the_rule_only_where_its_gain_exceeds_the_standard_error():
    noise = {"max": torch.tensor([4.0, 4.0, 4.0]), "mse": torch.tensor([3.0, 3.0, 3.5])}
    assert better_than("max", noise) == "mse"
    assert better_than("max", noise | {"mse": torch.tensor([0.0, 6.0, 5.0])}) == "max"  # less in all, not over most
    assert better_than("mse", noise) == "mse"
    assert least(noise | {"mse": torch.tensor([0.0, 6.0, 5.0])}) == "mse"


def test_equalised_halves_are_new_to_each_other():
    model, halves = tiny_model("vit"), tiny_halves(2)
    inputs, _ = inputs_of(equalise(model, halves, EqualiseConfig(exponents=(0.9,))), halves)
    assert any(scale.widening != 1 or bool((scale.factor != 1).any()) for scale in inputs.scales[0].values())
    plain, _ = inputs_of(model, halves)
    assert all(scale.widening == 1 and bool((scale.factor == 1).all()) for scale in plain.scales[0].values())
    assert isinstance(plain.scales[0]["blocks.0.attn.qkv"], FoldScale)


def test_layers_that_read_one_tensor_choose_by_the_sum_of_their_errors():
    noise = {
        "query": {"max": torch.tensor([1.0, 2.0]), "mse": torch.tensor([3.0, 4.0])},
        "key": {"max": torch.tensor([7.0, 7.0]), "mse": torch.tensor([1.0, 1.0])},
        "proj": {"max": torch.tensor([1.0, 1.0]), "mse": torch.tensor([0.0, 0.0])},
    }
    found = together(noise, [("query", "key", "in float"), ("in float",)])
    assert least(noise["query"]) == "max"
    assert {layer: least(of_layer) for layer, of_layer in found.items()} == dict.fromkeys(noise, "mse")
    assert found["query"]["max"].tolist() == found["key"]["max"].tolist() == [8.0, 9.0]
    assert found["proj"] is noise["proj"]
