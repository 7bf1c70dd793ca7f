"""Fitting layer by layer: which images give which sums, and which fit remains. Oracle: errors of the rows themselves."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from calib.layerwise import layer_fits
from calib.layerwise.layer_fits import LayerTrials, best_fit, fitted_layers, groups_of_layers
from calib.layerwise.layer_sums import LayerSums, pooled
from calib.methods import erq, gptq, rtn
from calib.network.rounded_layer import augmented_weight, rounded_layer, rounded_layers
from calib.quantizer import channel_qparams
from calib.scales.calibrate import Config, calibrate
from calib.store.watch import Watch
from tests.tiny import tiny_halves, tiny_model


def layer_and_sums():
    """A layer, and sums of rows x whose rounding error is `sign` times what rounding coarsely gives."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 10).requires_grad_(False)
    x = torch.randn(600, 1, 8) @ torch.randn(8, 8)

    def sums(start, sign=1.0):
        rows = x[start : start + 150]
        rounded = torch.round(rows / 0.7) * 0.7
        found = LayerSums(augmented_weight(layer))
        found.update(rounded + sign * (rows - rounded), rounded)
        return found

    return layer, sums


def test_the_option_with_the_least_error_on_the_other_half_remains():
    layer, sums = layer_and_sums()
    parts = [[sums(0), sums(150)], [sums(300), sums(450)]]
    halves = [pooled(of_half) for of_half in parts]
    for options in ((1e-9, 0.05, 1e9), (1e9, 0.05), (0.05,)):

        def least(chosen, options=options):
            errors = {
                option: sum(
                    parts[1 - half][part].error(erq.fit(halves[half], option)) for half in (0, 1) for part in chosen
                )
                for option in options
            }
            return min(errors, key=errors.get)

        found = best_fit(rounded_layer(layer, channel_qparams(layer.weight, 2)), options, erq.fit, parts)
        for part, trials in enumerate(found.trials):  # the part that chooses in this rotation
            for half, one in zip(halves, trials, strict=True):
                assert torch.equal(one.integers, erq.fit(half, least([part])).integers)
        assert torch.equal(found.whole.integers, erq.fit(pooled(halves), least([0, 1])).integers)


@pytest.mark.parametrize("method", ["erq", "gptq"])
def test_a_layer_that_rounds_to_nearest_better_on_the_other_half_is_left_alone(method):
    """Two halves that contradict each other: what one teaches harms on the other."""
    layer, sums = layer_and_sums()
    plain = rounded_layer(layer, channel_qparams(layer.weight, 8 if method == "erq" else 3))
    even = torch.randn(500, 1, 4)

    def correlated(sign):
        x = torch.cat([even, sign * even + 0.1 * torch.randn(500, 1, 4)], -1)
        found = LayerSums(augmented_weight(layer))
        found.update(x, x)
        return found

    if method == "erq":
        fit, contrary, agreeing = erq.fit, [sums(0, -3.0), sums(150, 3.0)], [sums(0), sums(150)]
    else:
        fit = lambda one, damping: gptq.fit(one, plain.params, damping)  # noqa: E731
        contrary, agreeing = [correlated(1), correlated(-1)], [correlated(1), correlated(1)]
    assert best_fit(plain, (0.01,), fit, [[one] * 2 for one in contrary]) == ((None, None), None)
    found = best_fit(plain, (0.01,), fit, [[one] * 2 for one in agreeing])
    assert [len(trials) for trials in found.trials] == [2, 2]
    assert found.whole is not None


@pytest.mark.parametrize("memory", [1, 1 << 40])
def test_every_layer_is_given_the_images_of_each_part(monkeypatch, memory):
    monkeypatch.setattr(layer_fits, "MEMORY", memory)
    halves = tiny_halves(3)
    model = calibrate(tiny_model("vit"), halves, Config("max"))
    plain, seen, steps = rounded_layers(rtn.nearest(model).whole), {}, []

    def note(name, sums):
        seen[name] = [[part.count for part in half] for half in sums]
        layer = plain[name]
        if name.endswith("proj"):
            return LayerTrials((None, None), None)
        shifted = [replace(layer, bias=layer.bias + which) for which in range(5)]
        return LayerTrials((shifted[:2], shifted[2:4]), shifted[4])

    def new_sums(name):
        return LayerSums(augmented_weight(model.net.get_submodule(name)))

    found = fitted_layers(model, halves, 1 << 30, new_sums, note, Watch(lambda *step: steps.append(step)))
    tokens = 17
    assert seen == {name: [[4 * tokens, 8 * tokens]] * 2 for name in model.layers}
    given = [*found.trials[0], *found.trials[1], found.whole]
    assert [set(layers) for layers in given] == [{name for name in model.layers if not name.endswith("proj")}] * 5
    for which, layers in enumerate(given):
        assert all(torch.equal(layer.bias, plain[name].bias + which) for name, layer in layers.items())
    assert steps == [(done, len(model.layers)) for done in range(1, len(model.layers) + 1)]


def test_rows_are_shared_between_batches():
    halves = tiny_halves(2)
    model, counts = calibrate(tiny_model("vit"), halves, Config("max")), []

    def count(_name, sums):
        counts.append(sum(part.count for half in sums for part in half))
        return LayerTrials((None, None), None)

    def new_sums(name):
        return LayerSums(augmented_weight(model.net.get_submodule(name)))

    fitted_layers(model, halves, 40, new_sums, count, Watch())
    assert counts == [40] * len(model.layers)


def test_layers_share_a_pass_within_memory(monkeypatch):
    model = tiny_model("vit")
    layers = list(model.layers)
    assert list(groups_of_layers(model)) == [layers]
    monkeypatch.setattr(layer_fits, "MEMORY", 1)
    assert list(groups_of_layers(model)) == [[name] for name in layers]
