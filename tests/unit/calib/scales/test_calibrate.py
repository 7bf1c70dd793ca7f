import dataclasses

import pytest
import torch

from calib.images.batches import spread_images
from calib.precision import Precision
from calib.scales.calibrate import Config, calibrate
from tests.tiny import half_of, tiny_batches, tiny_halves, tiny_model


def test_the_search_says_what_it_chose_and_what_it_gained_on_held_out_images():
    found = calibrate(tiny_model("vit"), tiny_halves(2), Config("search"))
    note = found.history[-1].notes[0]
    assert note.startswith("8 activation scales by ")
    assert "(output SQNR on held-out images " in note
    assert {name for name in found.quantizers if name.endswith(":input")} == {
        f"{layer}:input" for layer in tiny_model("vit").layers
    }


def test_all_images_together_give_the_final_scale():
    model = tiny_model("vit")
    small, large = tiny_batches(2), [batch * 5 for batch in tiny_batches(2)]
    apart = calibrate(model, [half_of(small), half_of(large)], Config("max")).quantizers
    mixed = calibrate(model, [half_of(large), half_of(small)], Config("max")).quantizers
    assert all(torch.equal(apart[name].scale, mixed[name].scale) for name in apart)
    largest = calibrate(model, [half_of(large)] * 2, Config("max")).quantizers
    assert all(float(apart[name].scale) >= float(largest[name].scale) for name in largest)


@pytest.mark.parametrize(
    "config", [Config("max"), Config("mse"), Config("percentile", 99.0), Config("search")], ids=str
)
def test_the_threshold_of_each_half_is_kept(config):
    halves = [half_of(tiny_batches(2, seed=1)), half_of([batch * 2 for batch in tiny_batches(2, seed=2)])]
    model = tiny_model("vit")
    found = calibrate(model, halves, config).half_thresholds
    assert set(found) == set(model.layers)
    if config.observer != "search":  # it would choose anew
        alone = [calibrate(model, [half] * 2, config).half_thresholds for half in halves]
        for layer, thresholds in found.items():
            assert thresholds == tuple(half[layer][0] for half in alone)


def test_inputs_that_do_not_round_get_no_levels():
    model = dataclasses.replace(tiny_model("vit"), precision=Precision(4, 32))
    found = calibrate(model, tiny_halves(2), Config("max"))
    x = torch.randn(5)
    assert all(torch.equal(grid.fake_quantize(x), x) for grid in found.quantizers.values())


def test_images_are_taken_evenly():
    batches = [torch.arange(start, start + 4) for start in (0, 4, 8, 12)]
    assert spread_images(batches, 4).tolist() == [0, 4, 8, 12]
    assert spread_images(batches, 8).tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    assert spread_images(batches, 2).tolist() == [0, 8]
    assert spread_images(batches, 99).tolist() == list(range(16))
