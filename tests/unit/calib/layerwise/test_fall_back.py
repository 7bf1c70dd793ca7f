"""As few layers as a limit needs go back to FP16, those that gain most for their work first."""

import itertools

import pytest
import torch

from calib.errors import TooFewError
from calib.layerwise.fall_back import MOST, Config, by_gain_per_work, fall_back, fewest
from calib.network.qdq import quantized_net
from tests.tiny import calibrated, tiny_halves
from tests.tiny import rounded as rounded_by


def test_layers_come_in_the_order_of_gain_per_work_behind_those_before():
    # t of one sample: 10 is missing, the layers would add -6, -3, -5
    terms = torch.tensor([[10.0, -6.0, -3.0, -5.0]], dtype=torch.float64)
    assert by_gain_per_work(terms, [0.4, 0.01, 0.1], most=1.0) == [1, 2]  # then 2 is missing, and -6 would make it 4
    assert by_gain_per_work(terms, [0.4, 0.4, 0.4], most=0.5) == [0]
    assert by_gain_per_work(-terms.abs(), [0.1, 0.1, 0.1]) == []


@pytest.mark.parametrize(("count", "least"), [*itertools.combinations_with_replacement(range(6), 2)])
def test_the_fewest_is_found_as_by_trying_all(count, least):
    count, least = max(count, least), min(count, least)
    assert fewest(count, lambda taken: taken >= least) == least
    assert fewest(count, lambda taken: taken > count) is None


@pytest.fixture(scope="module")
def rounded():
    halves = tiny_halves()
    return rounded_by(calibrated("vit", halves), halves), halves


@torch.no_grad()
def sqnr(exact, found):
    exact, found = ((each["output"] if isinstance(each, dict) else each) for each in (exact, found))
    return float(10 * torch.log10(exact.square().sum() / (exact - found).square().sum()))


def test_a_limit_that_is_kept_changes_nothing(rounded):
    model, halves = rounded
    found = fall_back(model, halves, Config("MAX_DROP=1dB"), lambda exact, got, _sources: sqnr(exact, got) >= 1)
    assert not found.kept_float
    assert found.quantized_layers == model.quantized_layers
    assert "kept with 0 of" in found.history[-1].notes[0]


@torch.no_grad()
def test_layers_go_back_until_the_limit_is_kept(rounded):
    model, halves = rounded
    image = next(iter(halves[0]))
    plain = sqnr(model.float_net(image), quantized_net(model)(image))
    limit = plain + 1.5
    found = fall_back(model, halves, Config("MAX_DROP=here"), lambda exact, got, _sources: sqnr(exact, got) >= limit)
    assert 0 < len(found.kept_float) < len(model.quantized_layers)
    assert {*found.kept_float.values()} == {"back in FP16 to keep MAX_DROP=here"}
    assert found.history[-1].sqnr_after_db >= limit > found.history[-1].sqnr_before_db


def test_what_cannot_be_kept_takes_half_of_the_work_and_says_so(rounded):
    model, halves = rounded
    found = fall_back(model, halves, Config("MAX_DROP=999dB"), lambda exact, got, _sources: sqnr(exact, got) >= 999)
    assert found.kept_float
    assert found.quantized_layers  # still an INT8 network
    assert "not kept on calibration images, even with" in found.history[-1].notes[0]
    assert float(found.history[-1].notes[0].split("FP16, ")[1].split("%")[0]) <= 100 * MOST


def test_images_that_cannot_show_it_send_no_layer_back(rounded):
    def too_few(*_):
        raise TooFewError("8 images that calibration can spare cannot show it, 100 could")

    model, halves = rounded
    found = fall_back(model, halves, Config("MAX_DROP=1%"), too_few)
    assert not found.kept_float
    (note,) = found.history[-1].notes
    assert note.startswith(
        "MAX_DROP=1%: 8 images that calibration can spare cannot show it, 100 could; no layer goes back"
    )
