import torch
from torch import nn

from calib.calibrate import Config, best_for_layer, calibrate, candidates, rounded_inputs, spread_images
from calib.observers import Histogram
from calib.quantizer import qparams_from_amax
from tests.tiny import tiny_batches, tiny_model


def histogram_of(x: torch.Tensor) -> Histogram:
    histogram = Histogram()
    histogram.update(x)
    return histogram


def test_rounded_inputs_rounds_the_input_and_leaves_no_hook():
    net, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    grid = qparams_from_amax(torch.tensor(1.0))
    with torch.no_grad(), rounded_inputs(net, {"0": grid}):
        found = net(x)
    expected = net[0](grid.fake_quantize(x))
    torch.testing.assert_close(found, expected.detach())
    assert not net[0]._forward_pre_hooks


def test_the_best_for_a_layer_clips_a_lone_outlier_that_carries_nothing():
    layer = nn.Linear(8, 8)
    rows = torch.randn(4096, 1, 8)
    spoiled = rows.clone()
    spoiled[0] = 100.0
    chosen = best_for_layer(layer, [candidates(histogram_of(spoiled))] * 2, [rows, rows])
    assert candidates(histogram_of(spoiled))[chosen] < 10


def test_the_search_takes_what_serves_the_networks_output_best():
    model = tiny_model("vit")
    folds = [tiny_batches(2, seed=1), tiny_batches(2, seed=2)]
    searched = calibrate(model, folds, Config("search"))
    note = searched.history[-1].notes[0]
    assert note.startswith("8 activation scales by '")
    figures = [float(part.split(" dB")[0].split()[-1]) for part in note.split("(")[1].split(", ")]
    assert figures == sorted(figures, reverse=True)
    assert len(figures) == 9  # max, four percentiles, MSE, entropy, max with a margin, the best per layer


def test_all_folds_together_give_the_final_scale():
    model = tiny_model("vit")
    small, large = tiny_batches(1), [batch * 5 for batch in tiny_batches(1)]
    together = calibrate(model, [small, large], Config("max")).sites
    whole = calibrate(model, [small + large], Config("max")).sites
    assert all(torch.equal(together[name].scale, whole[name].scale) for name in whole)


def test_images_are_taken_evenly():
    batches = [torch.arange(start, start + 4) for start in (0, 4, 8, 12)]
    assert spread_images(batches, 4).tolist() == [0, 4, 8, 12]
    assert spread_images(batches, 8).tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    assert spread_images(batches, 2).tolist() == [0, 8]
    assert spread_images(batches, 99).tolist() == list(range(16))
