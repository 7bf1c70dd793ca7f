import dataclasses

import pytest
import torch

from calib.attention import int8 as int8_attention
from calib.quantizer import QMAX, qparams_from_amax
from calib.scales.calibrate import Config, calibrate
from calib.scales.coverage import MAX_OUTSIDE, MAX_SPREAD, Coverage, Outside, coverage, outside, spread
from tests.tiny import TINY, half_of, rounded, tiny_batches, tiny_halves, tiny_model

MAX = Config("max")
FINE = (Outside("a", MAX_OUTSIDE, 1.2), Outside("b", 0.0, 0.9))


def calibrated(halves, family="vit", config=MAX):
    halves = [half_of(batches) for batches in halves]
    return rounded(calibrate(tiny_model(family), halves, config), halves)


def test_spread_is_the_ratio_of_the_halves_thresholds():
    assert spread({"a": [2.0, 3.0], "b": [5.0, 4.0], "dead": [0.0, 0.0], "rare": [0.0, 1.0]}) == {"a": 1.5, "b": 1.25}


def test_halves_of_one_distribution_agree_and_of_two_do_not():
    same = coverage(calibrated([tiny_batches(4, seed=1), tiny_batches(4, seed=2)]), tiny_batches(2, seed=3))
    assert same.warnings() == []
    model = calibrated([tiny_batches(4, seed=1), [batch * 4 for batch in tiny_batches(4, seed=2)]], "resnet")
    (warning,) = coverage(model, tiny_batches(2, seed=3)).warnings()
    assert "its halves disagree" in warning
    assert "in 'layer" in warning


@pytest.mark.parametrize("family", sorted(TINY))
def test_outside_is_what_the_quantizer_would_clip(family):
    model = calibrated([tiny_batches(1)] * 2, family, Config("percentile", 99.0))
    batches = [batch * 1.5 for batch in tiny_batches(2, seed=3)]
    found, images = outside(model, batches)
    assert images == 8
    assert {each.layer for each in found} == set(model.quantized_layers)
    assert [each.fraction for each in found] == sorted((each.fraction for each in found), reverse=True)

    worst = found[0]
    inputs = []
    layer = model.net.get_submodule(worst.layer)
    hook = layer.register_forward_hook(lambda _m, x, _y: inputs.append(x[0].abs().flatten()))
    with torch.no_grad():
        for batch in batches:
            model.net(batch)
    hook.remove()
    steps = torch.cat(inputs) / model.quantizers[f"{worst.layer}:input"].scale
    assert worst.fraction == float((torch.round(steps) > QMAX).double().mean()) > 0
    assert worst.largest == pytest.approx(float(steps.max()) / (QMAX + 0.5))
    assert not layer._forward_pre_hooks


def test_the_factors_of_an_int8_attention_count_too():
    halves = tiny_halves(2)
    plain = rounded(calibrate(tiny_model("vit"), halves, MAX), halves)
    model = int8_attention.int8_attention(plain, halves, int8_attention.Config("all"))
    narrow = {f"blocks.1.attn:{role}": qparams_from_amax(torch.tensor(0.5)) for role in ("query", "key", "value")}
    model, (batch,) = model.with_quantizers(narrow), tiny_batches(1, seed=3)
    found = {each.layer: each for each in outside(model, [batch])[0]}
    factors = {f"blocks.{block}.attn:{role}" for block in (0, 1) for role in ("query", "key", "value")}
    assert set(found) == {*model.quantized_layers, *factors}
    packed = []
    hook = model.net.blocks[1].attn.qkv.register_forward_hook(lambda _m, _x, y: packed.append(y))
    with torch.no_grad():
        model.net(batch)
    hook.remove()
    query, key, value = packed[0].chunk(3, dim=-1)
    for role, x in {"query": query / 2, "key": key / 2, "value": value}.items():  # 16^-1/4
        steps = x.abs() / model.quantizers[f"blocks.1.attn:{role}"].scale
        each = found[f"blocks.1.attn:{role}"]
        assert 0 < each.fraction == pytest.approx(float((torch.round(steps) > QMAX).double().mean()), abs=1e-4)
        assert each.largest == pytest.approx(float(steps.max()) / (QMAX + 0.5), rel=1e-5)


def test_other_images_that_are_clipped_are_a_warning():
    model = calibrated([tiny_batches(2, seed=1), tiny_batches(2, seed=2)], "resnet")
    assert coverage(model, tiny_batches(2, seed=3)).warnings() == []
    (warning,) = coverage(model, [batch * 3 for batch in tiny_batches(2, seed=3)]).warnings()
    assert "do not cover the evaluation images" in warning
    assert "'layer" in warning


def test_limits_themselves_are_still_fine():
    at_limit = Coverage({"a": 1.0, "b": MAX_SPREAD, "c": 9.0}, FINE, 4)
    assert at_limit.warnings() == []
    assert len(dataclasses.replace(at_limit, spread={"a": MAX_SPREAD * 1.01}).warnings()) == 1
    assert len(dataclasses.replace(at_limit, outside=(Outside("a", MAX_OUTSIDE * 1.01, 1.0),)).warnings()) == 1


def test_the_report_names_the_worst():
    found = Coverage({"a": 1.0, "b": 1.1, "c": 9.0}, FINE, 4)
    assert found.to_json() == {
        "spread": {"median": 1.1, "worst": 9.0, "worst_layer": "c"},
        "outside": [
            {"layer": "a", "fraction": MAX_OUTSIDE, "largest": 1.2},
            {"layer": "b", "fraction": 0.0, "largest": 0.9},
        ],
        "images": 4,
    }
    assert found.summary() == (
        "thresholds of the halves of the images differ by a factor of 1.10; of 4 other images at most 0.50% of the values "
        "are clipped, in a"
    )
