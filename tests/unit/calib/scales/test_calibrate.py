import re

import torch

from calib.images.batches import spread_images
from calib.scales.calibrate import Config, calibrate
from calib.scales.threshold_search import JUDGED_RULES
from tests.tiny import tiny_batches, tiny_model


def test_the_search_takes_what_serves_the_networks_output_best():
    model = tiny_model("vit")
    folds = [tiny_batches(2, seed=1), tiny_batches(2, seed=2)]
    searched = calibrate(model, folds, Config("search"))
    note = searched.history[-1].notes[0]
    assert note.startswith("8 activation scales by '")
    figures = [float(figure) for figure in re.findall(r"(-?[0-9.]+) dB", note)]
    assert figures == sorted(figures, reverse=True)
    # the three rules foretold the least noise, the best per layer, and that without narrowing
    assert len(figures) == JUDGED_RULES + 2


def test_all_folds_together_give_the_final_scale():
    model = tiny_model("vit")
    small, large = tiny_batches(1), [batch * 5 for batch in tiny_batches(1)]
    together = calibrate(model, [small, large], Config("max")).quantizers
    whole = calibrate(model, [small + large], Config("max")).quantizers
    assert all(torch.equal(together[name].scale, whole[name].scale) for name in whole)


def test_images_are_taken_evenly():
    batches = [torch.arange(start, start + 4) for start in (0, 4, 8, 12)]
    assert spread_images(batches, 4).tolist() == [0, 4, 8, 12]
    assert spread_images(batches, 8).tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    assert spread_images(batches, 2).tolist() == [0, 8]
    assert spread_images(batches, 99).tolist() == list(range(16))
