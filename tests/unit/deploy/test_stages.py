"""The torch half: stages in order, shared beginnings computed once, and what harms is rolled back."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from calib.grids import LogSqrt2
from calib.methods import rtn
from calib.network.qdq import quantized_net
from calib.quant_model import StageRecord
from deploy import stages
from deploy.recipe import recipe_from_tables
from deploy.stages import CalibrationImages, Simulator
from tests.tiny import tiny_batches, tiny_model

ALL = {
    "precision": {"weights": 4, "inputs": 6, "first_last": 8}, "equalise": {}, "attention": {},
    "calibrate": {"observer": "max"},
    "method": {"name": "erq"}, "compensate": {"forms": ["dense"]}, "finetune": {},
}  # fmt: skip


def images():
    batches = tiny_batches(8)
    return CalibrationImages(batches[0][:1], [batches[:4], batches[4:]], batches)


def recipe(**changes):
    content = {**ALL, "attention": None, "finetune": None, **changes}
    return recipe_from_tables("r", {key: value for key, value in content.items() if value is not None}, "r")


def test_every_stage_leaves_its_record_in_the_order_they_compose():
    full = recipe(attention={}, finetune={}, precision={})
    assert [stage.name for stage in stages.stages(full)] == [
        "fold", "equalise", "attention", "calibrate", "erq", "choose attention", "compensate", "finetune",
    ]  # fmt: skip
    history = Simulator(tiny_model("vit"), images()).run(full).history
    assert [record.stage for record in history] == [
        "fold", "equalise", "attention", "calibrate", "erq", "choose attention", "qwt", "qwt_star",
    ]  # fmt: skip
    assert all(record.notes for record in history)


def test_attention_rounds_in_a_simulation_that_asks_for_it():
    simulated = recipe(precision={"weights": 4, "inputs": 4, "attention": "log_sqrt2"}, compensate=None, method=None)
    model = Simulator(tiny_model("vit"), images()).run(simulated)
    assert [record.stage for record in model.history] == ["fold", "equalise", "simulated attention", "calibrate", "rtn"]
    assert model.int8_attention == ("blocks.0.attn", "blocks.1.attn")
    assert isinstance(model.quantizers["blocks.0.attn:softmax"], LogSqrt2)


def outputs(model):
    with torch.no_grad():
        return quantized_net(model)(images().whole[0])


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


def harmful(stage, change):
    """A repair that changes the model by `change` and says itself that the output is worse."""
    return lambda model, *_, **__: change(model).with_record(StageRecord(stage, {}, 1.0, 20.0, 18.0, ("made",)))


@pytest.mark.parametrize(("stage", "position"), [("compensate", -2), ("finetune", -1)])
def test_a_repair_that_lowers_the_output_is_rolled_back_and_says_so(monkeypatch, stage, position):
    empty = recipe(finetune={}, method={"name": "rtn"}, precision={})
    monkeypatch.setattr(stages, stage, harmful(stage, lambda model: replace(model, branches={"blocks.0": None})))
    other = {"compensate": "finetune", "finetune": "compensate"}[stage]
    monkeypatch.setattr(stages, other, lambda model, *_, **__: model.with_record(StageRecord(other, {})))
    found = Simulator(tiny_model("vit"), images()).run(empty)
    assert found.branches == {}
    record = found.history[position]
    assert record.notes == ("made", "rolled back: network output 18.00 dB against 20.00 dB on other photographs")
    assert record.sqnr_after_db == record.sqnr_before_db == 20.0


def test_weights_round_to_nearest_where_a_method_lowers_the_output(monkeypatch):
    bad = SimpleNamespace(reduce_error=harmful("bad", lambda model: replace(model, net=None)))
    monkeypatch.setattr(stages, "method_module", lambda _: bad)
    found = Simulator(tiny_model("vit"), images()).run(recipe(compensate=None))
    assert "rolled back" in found.history[-1].notes[-1]
    assert set(found.quantized_layers) == set(found.layers)
    assert found.quantizers.keys() >= rtn.weight_quantizers(found).keys()


def test_a_repair_that_helps_or_does_not_measure_stays(monkeypatch):
    for before, after in ((20.0, 21.0), (20.0, 20.0), (None, None)):
        record = StageRecord("finetune", {}, 1.0, before, after, ("made",))
        monkeypatch.setattr(stages, "finetune", lambda model, *_, record=record, **__: model.with_record(record))
        tuned = Simulator(tiny_model("vit"), images()).run(recipe(compensate=None, finetune={}))
        assert tuned.history[-1] == record
