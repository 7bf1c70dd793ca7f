"""The torch half: stages in order, shared beginnings computed once, and what harms is dropped."""

import copy
import functools
from dataclasses import dataclass, replace

import pytest
import torch

from calib.errors import UserError
from calib.grids import LogSqrt2
from calib.images.batches import Half, Part
from calib.judge.held_out import Candidate, Offer
from calib.methods import rtn
from calib.network.qdq import quantized_net
from calib.scales.calibrate import Config, calibrate
from deploy import stages
from deploy.recipe import recipe_from_tables
from deploy.stages import CalibrationImages, Simulator, judged
from tests.tiny import tiny_batches, tiny_halves, tiny_model

ALL = {
    "precision": {"weights": 4, "inputs": 6, "first_last": 8}, "equalise": {},
    "calibrate": {"observer": "max"}, "method": {"name": "erq"}, "compensate": {"forms": ["dense"]},
}  # fmt: skip


def images():
    return CalibrationImages(tiny_batches(1)[0][:1], tiny_halves(4))


def recipe(**changes):
    content = {**ALL, **changes}
    return recipe_from_tables("r", {key: value for key, value in content.items() if value is not None}, "r")


def test_every_stage_leaves_its_record_in_the_order_they_compose():
    full = recipe(attention={}, finetune={}, precision={})
    assert [stage.name for stage in stages.stages(full)] == [
        "fold", "equalise", "calibrate", "erq", "attention", "compensate", "finetune",
    ]  # fmt: skip
    history = Simulator(tiny_model("vit"), images()).run(full).history
    assert [record.stage for record in history] == [
        "fold", "equalise", "calibrate", "erq", "attention", "qwt", "qwt_star",
    ]  # fmt: skip
    assert all(record.notes for record in history)
    assert [record.config for record in history[-2:]] == [full.compensate.__dict__, full.finetune.__dict__]


def test_attention_rounds_in_a_simulation_that_asks_for_it():
    simulated = recipe(precision={"weights": 4, "inputs": 4, "attention": "log_sqrt2"}, compensate=None, method=None)
    model = Simulator(tiny_model("vit"), images()).run(simulated)
    assert [record.stage for record in model.history] == ["fold", "equalise", "simulated attention", "calibrate", "rtn"]
    assert model.int8_attention == ("blocks.0.attn", "blocks.1.attn")
    assert isinstance(model.quantizers["blocks.0.attn:softmax"], LogSqrt2)


def test_int8_attention_of_a_network_without_any_is_refused():
    with pytest.raises(UserError, match="EfficientNet has none"):
        Simulator(tiny_model("mobilenet"), images()).run(recipe(attention={}, equalise=None, method=None, precision={}))


def outputs(model):
    with torch.no_grad():
        return quantized_net(model)(tiny_batches(1, seed=5)[0])


def test_what_two_recipes_begin_with_is_computed_once_and_gives_the_same(monkeypatch):
    calls = []
    equalise = stages.equalise
    monkeypatch.setattr(stages, "equalise", lambda *args: calls.append(1) or equalise(*args))
    shared = Simulator(tiny_model("vit"), images())
    first, second = recipe(compensate=None), recipe()
    results = [shared.run(each) for each in (first, second)]
    assert len(calls) == 1
    assert results[1].history[: len(results[0].history)] == results[0].history
    for each, result in zip((first, second), results, strict=True):
        assert torch.equal(outputs(result), outputs(Simulator(tiny_model("vit"), images()).run(each)))
    assert shared.run(first).branches == {}, "nothing is left of the longer recipe"
    assert shared.run(recipe(precision={"weights": 3, "inputs": 6})).precision.weights == 3
    assert len(calls) == 4, "other bits begin anew"


# decisions


@dataclass(frozen=True)
class Options:
    rows: int = 3


@functools.cache
def quantized():
    halves = tiny_halves(4)
    return rtn.nearest(calibrate(tiny_model("vit"), halves, Config("max"))).whole


def changed(model, name, by):
    """A candidate whose output is off by `by` everywhere, beside what rounding does."""
    net = copy.deepcopy(model.net)
    net.head.bias.data += by
    return Candidate.unfitted(name, replace(model, net=net))


def decided(*offered, notes=("made",)):
    incumbent = changed(quantized(), "incumbent", 0.5)
    offer = Offer(list(offered), notes, {"figure": 1})
    return incumbent, judged("repair", Options(), incumbent, tiny_halves(4), lambda: offer)


def sqnr_db(model):
    """On the images that judge."""
    signal = noise = 0.0
    for x in (x for half in tiny_halves(4) for x in half):
        with torch.no_grad():
            exact = model.float_net(x).double()
            signal, noise = signal + exact.square().sum(), noise + (quantized_net(model)(x) - exact).square().sum()
    return float(10 * torch.log10(signal / noise))


def test_a_candidate_with_less_error_stays_and_its_record_says_so():
    incumbent, found = decided(changed(quantized(), "worse", 1.0), changed(quantized(), "better", 0.0))
    assert torch.equal(found.net.head.bias, quantized().net.head.bias)
    record = found.history[-1]
    assert (record.stage, record.config, record.details) == ("repair", {"rows": 3}, {"figure": 1})
    assert record.sqnr_before_db == pytest.approx(sqnr_db(incumbent.whole))
    assert record.sqnr_after_db == pytest.approx(sqnr_db(quantized()))
    assert record.notes[0].startswith("better: output SQNR ")
    assert record.notes[1:] == ("made",)
    assert record.seconds > 0


def test_a_candidate_with_more_error_is_dropped_and_the_record_says_so():
    incumbent, found = decided(changed(quantized(), "worse", 1.0))
    assert replace(found, history=incumbent.whole.history) == incumbent.whole
    record = found.history[-1]
    assert record.notes[0].startswith("dropped: worse: output SQNR ")
    assert record.sqnr_after_db == record.sqnr_before_db == pytest.approx(sqnr_db(incumbent.whole))


def test_without_candidates_nothing_is_measured():
    incumbent, found = decided(notes=("nothing to do",))
    assert replace(found, history=incumbent.whole.history) == incumbent.whole
    record = found.history[-1]
    assert (record.notes, record.sqnr_before_db, record.sqnr_after_db) == (("nothing to do",), None, None)


@pytest.mark.parametrize(("method", "table"), [("qwt", {"compensate": {}}), ("finetune", {"finetune": {}})])
def test_branches_that_harm_the_output_are_dropped(monkeypatch, method, table):
    def harm(model, *_):
        bad = changed(model, "harmful", 1.0)
        return Offer([replace(bad, whole=replace(bad.whole, branch_figures={"blocks.0": {}}))], ("made",))

    monkeypatch.setattr(getattr(stages, method), "candidates", harm)
    found = Simulator(tiny_model("vit"), images()).run(
        recipe(**{"compensate": None, "method": None, "precision": {}} | table)
    )
    assert found.branch_figures == {}
    assert found.history[-1].notes[0].startswith("dropped: harmful: ")


def test_a_method_is_compared_with_corrected_biases_where_they_help(monkeypatch):
    """Rounding to nearest shifts the mean output of a network whose images are bright."""
    seen = []

    def candidates(_model, plain, *_):
        seen.append(plain)
        return Offer([], ("none",))

    monkeypatch.setattr("calib.methods.gptq.candidates", candidates)
    bright = [Half(tuple(Part([x + 2 for x in part]) for part in half.parts)) for half in tiny_halves(4)]
    three_bits = recipe(
        precision={"weights": 3, "inputs": 8, "first_last": 8}, equalise=None, compensate=None, method={"name": "gptq"}
    )
    found = Simulator(tiny_model("vit"), CalibrationImages(next(iter(bright[0]))[:1], bright)).run(three_bits)
    (plain,) = seen
    assert plain.name == "bias correction"
    assert found.net is plain.whole.net
