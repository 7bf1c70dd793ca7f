from dataclasses import replace

import pytest
import torch
from torch import nn

from calib.images.batches import Half, Part
from calib.learned.learned_layer import DEQUANT_SCALE, INPUT_SCALE, OFFSET, QUANT_SCALE, ROUNDING, SCALE
from calib.methods import adaround, rtn
from calib.network.qdq import quantized_net
from calib.network.unit_io import readers_and_sizes, unit_io
from calib.precision import Precision
from calib.quantizer import fp16_scale
from calib.store.checkpoint import Checkpoint
from calib.store.watch import UNWATCHED, Watch
from calib.structure.in_front import put_in_front
from tests.tiny import calibrated, output_db, rounded, same_numbers, tiny_batches, tiny_halves, tiny_model

FAST = adaround.Config(iterations=20, batch=4)
UNFOLLOWED = adaround.Course(Checkpoint(None), UNWATCHED, FAST.iterations)


def offered(model, halves, config=FAST, watch=UNWATCHED):
    return adaround.candidates(model, rtn.nearest(model), halves, config, watch)


def learned(config):
    return [set(phase.learned) for phase in config.phases()]


def test_the_cases_learn_what_table_1_says():
    plain = {name: learned(adaround.Config(name, offset=False)) for name in adaround.CASES}
    assert plain == {
        "1.1.1": [{ROUNDING}, {INPUT_SCALE}],
        "1.1.2": [{ROUNDING, INPUT_SCALE}],
        "1.2": [{SCALE, INPUT_SCALE}],
        "2.1": [{ROUNDING, QUANT_SCALE, INPUT_SCALE}],
        "2.2": [{ROUNDING, DEQUANT_SCALE, INPUT_SCALE}],
        "2.3": [{ROUNDING, QUANT_SCALE, DEQUANT_SCALE, INPUT_SCALE}],
    }
    assert learned(adaround.Config("1.1.1", input_steps=False)) == [{ROUNDING}, {OFFSET}]
    assert learned(adaround.Config()) == [{ROUNDING, DEQUANT_SCALE, INPUT_SCALE, OFFSET}]
    assert [phase.exact_inputs for phase in adaround.Config("1.1.1").phases()] == [True, False]


def test_few_iterations_learn_faster():
    published, fewer, few = (adaround.Config(iterations=count).schedule(8) for count in (20_000, 1000, 20))
    assert (published.rounding_rate, published.step_rate) == (1e-3, 4e-5)
    assert fewer.rounding_rate * 1000 == pytest.approx(adaround.CROSSING)
    assert fewer.step_rate * 1000 == pytest.approx(published.step_rate * 20_000)
    assert few.step_rate * 127 == pytest.approx(0.25), "of an integer"
    assert adaround.Config(iterations=20).schedule(3).step_rate == pytest.approx(published.step_rate * 1000)
    assert adaround.Config(iterations=1).schedule(3).step_rate * 3 == pytest.approx(0.25)
    assert adaround.Config(step_rate=0.1).schedule(8).step_rate == 0.1


def test_the_bits_of_a_task_are_the_most_of_its_layers():
    model = replace(tiny_model("vit"), precision=Precision(3, 2, first_last=8))
    ends = {name for name in model.layers if model.bits(name).weight == 8}
    inner = [name for name in model.layers if name not in ends]
    assert adaround.most_bits(model, inner) == 3
    assert adaround.most_bits(model, model.layers) == 8
    assert adaround.most_bits(replace(model, precision=Precision(4, 32)), inner) == 4


@pytest.mark.parametrize("case", adaround.CASES)
def test_every_case_beats_round_to_nearest_at_few_bits(case):
    halves = tiny_halves(2)
    model = calibrated("vit", halves, Precision(3, 4))
    (found,) = offered(model, halves, replace(FAST, case=case)).candidates
    assert found.name == f"case {case}"
    assert output_db(found.whole) > output_db(rtn.nearest(model).whole)


def test_layers_share_blocks_and_those_outside_stand_alone():
    model = tiny_model("mobilenet")
    units = adaround.units(model)
    assert [name for layers in units.values() for name in layers] == list(model.layers)
    assert units["blocks.1.0"] == ["blocks.1.0.conv_pw", "blocks.1.0.conv_dw", "blocks.1.0.conv_pwl"]
    assert units["conv_head"] == ["conv_head"]


def test_depthwise_convolutions_learn():
    halves = tiny_halves(2)
    model = calibrated("mobilenet", halves, Precision(3, 4))
    found = rounded(model, halves, "adaround", iterations=20, batch=4)
    assert found.history[-1].sqnr_after_db > found.history[-1].sqnr_before_db
    assert output_db(found) > output_db(rounded(model, halves))


def test_an_engine_gets_integers_fp16_scales_and_no_new_node():
    halves = tiny_halves(2)
    model = calibrated("vit", halves, Precision(4, 8))
    assert model.precision.executable
    plain = rtn.nearest(model).whole
    (candidate,) = offered(model, halves, replace(FAST, iterations=80)).candidates
    found = candidate.whole
    assert found.quantizers.keys() == plain.quantizers.keys()
    for quantizer, params in found.quantizers.items():
        assert torch.equal(params.scale, fp16_scale(params.scale)), quantizer
        assert (params.scale > 0).all(), quantizer
    kinds = [[type(module) for module in quantized_net(each).modules()] for each in (plain, found)]
    assert kinds[0] == kinds[1]
    assert any(
        found.quantizers[quantizer].scale != plain.quantizers[quantizer].scale
        for quantizer in plain.quantizers
        if quantizer.endswith("input")
    )


def test_input_steps_stay_if_asked():
    halves = tiny_halves(2)
    model = calibrated("vit", halves, Precision(3, 4))
    (candidate,) = offered(model, halves, replace(FAST, input_steps=False)).candidates
    assert not same_numbers(candidate.whole, model)
    for quantizer, params in model.quantizers.items():
        assert torch.equal(candidate.whole.qparams(quantizer).scale, params.scale), quantizer


class Unread(list):
    """Images that nobody may look at."""

    def __iter__(self):
        raise AssertionError("the images that judge were read")


def test_it_is_tried_once_on_images_that_it_has_never_seen():
    halves = tiny_halves(2)
    model = calibrated("vit", halves, Precision(3, 4))
    chooses, _ = halves[1].parts
    (candidate,) = offered(model, [halves[0], Half((chooses, Part(Unread())))]).candidates
    assert candidate.trials == ((candidate.whole, None), (None, None))


def test_what_does_not_help_other_images_is_dropped(monkeypatch):
    halves = tiny_halves(2)
    model = calibrated("vit", halves)
    monkeypatch.setattr("calib.judge.held_out.MARGIN_DB", 100.0)
    found = rounded(model, halves, "adaround", iterations=2)
    assert same_numbers(found, model)
    assert found.history[-1].notes[0].startswith("dropped: case 2.2: ")
    assert found.history[-1].sqnr_after_db == found.history[-1].sqnr_before_db


def test_no_block_is_worse_on_images_held_out_than_it_started():
    halves, seen = tiny_halves(2), []
    model = calibrated("vit", halves)
    held_out, images = tiny_batches(1, seed=5)[0], torch.cat(list(halves[0]))
    plain = rtn.nearest(model).whole
    for layers, before, after in adaround.learned_layers(model, plain, images, held_out, FAST, UNFOLLOWED):
        assert after <= before
        seen += layers
    assert tuple(seen) == model.layers


class InterruptionError(Exception):
    pass


@pytest.mark.parametrize(
    ("options", "stop_at", "again"),
    [({}, 3, 3), ({}, 31, 31), ({"case": "1.1.1", "drop": 0.5}, 17, 18)],
)
def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path, monkeypatch, options, stop_at, again):
    """20 iterations, looked at every second in one phase: the step after the last look is the next."""
    monkeypatch.setattr(adaround, "SAVE_EVERY", 0.0)
    halves = tiny_halves(2)
    model = calibrated("vit", halves, Precision(3, 4))
    config = replace(FAST, **options)
    whole, seen = offered(model, halves, config), []

    def stop(step, _steps):
        if step == stop_at:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        offered(model, halves, config, Watch(stop, tmp_path))
    (file,) = tmp_path.iterdir()
    resumed = offered(model, halves, config, Watch(lambda *step: seen.append(step), tmp_path))
    count = len(adaround.units(model))
    assert seen == [(step, 20 * count) for step in range(again, 20 * count + 1)]
    one, other = (quantized_net(each.candidates[0].whole).state_dict() for each in (resumed, whole))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert resumed.notes == (*whole.notes, f"went on from checkpoint '{file}'")
    assert not list(tmp_path.iterdir())


def test_another_run_does_not_go_on_from_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(adaround, "SAVE_EVERY", 0.0)
    halves = tiny_halves(2)
    model = calibrated("vit", halves, Precision(3, 4))

    def stop(step, _steps):
        if step == 10:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        offered(model, halves, FAST, Watch(stop, tmp_path))
    others = [
        (model, halves, replace(FAST, regulariser=0.0)),
        (model, halves[::-1], FAST),
        (calibrated("resnet", halves), halves, FAST),
    ]
    for other in others:
        seen = []
        offered(*other, Watch(lambda step, _steps, seen=seen: seen.append(step), tmp_path))
        assert seen[0] == 1
    seen = []
    offered(model, halves, FAST, Watch(lambda step, _steps: seen.append(step), tmp_path))
    assert seen[0] > 1, "its own checkpoint is still there"


def test_a_unit_reads_and_returns_what_hooks_see():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3), nn.ReLU(inplace=True)).requires_grad_(False)
    batches = [torch.randn(2, 4), torch.randn(3, 4)]
    found, x = unit_io(net, "1", batches), torch.cat(batches)
    torch.testing.assert_close(found.inputs, net[0](x))
    torch.testing.assert_close(found.outputs, net[1](net[0](x)))
    assert (found.outputs < 0).any()  # taken before ReLU edits it


def test_what_stands_in_front_of_a_unit_runs_once_with_it():
    net, batches = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).requires_grad_(False), [torch.randn(5, 4)]
    put_in_front(net[1], nn.Softsign())
    found = unit_io(net, "1", batches)
    torch.testing.assert_close(found.inputs, net[0](batches[0]))
    torch.testing.assert_close(found.run(net[1], found.inputs), found.outputs)


def test_the_first_of_what_a_unit_returns_is_taken():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x.shape

    net, batches = nn.Sequential(Pair(4, 3)), [torch.randn(2, 4), torch.randn(3, 4)]
    found = unit_io(net, "0", batches)
    torch.testing.assert_close(found.outputs, net(torch.cat(batches))[0].detach())
    torch.testing.assert_close(found.run(net[0], found.inputs).detach(), found.outputs)


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        x = self.first(x)
        return self.one(x) + self.other(x) * 5


def test_layers_that_read_one_tensor_are_found():
    net, x = TwoReaders(), torch.randn(50, 4)
    groups, sizes = readers_and_sizes(net, ["first", "one", "other"], lambda: net(x))
    assert groups == [["first"], ["one", "other"]]
    assert sizes["other"] == pytest.approx(float(net.other(net.first(x)).detach().std()))


@pytest.mark.parametrize(
    "options",
    [{"case": "3.1"}, {"iterations": 0}, {"batch": 0}, {"images": 0}, {"regulariser": -1.0}, {"drop": 1.0}],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        adaround.Config(**options)
