import pytest

from benchmarks import stage_cost
from benchmarks.stage_cost import float_pass, measure
from calib.images.image_set import image_sets


def test_every_stage_of_the_recipe_is_timed_beside_the_float_network(monkeypatch):
    def few(calib, evaluation, preprocessing, _count, seed):
        return image_sets(calib, evaluation, preprocessing, 16, seed=seed)

    monkeypatch.setattr(stage_cost, "image_sets", few)
    found = measure("mobilenetv2", "int8_plain")
    assert list(found["stage_s"]) == ["fold", "calibrate", "rtn"]
    assert found["images"] == 16
    one = sum(found["float_pass_s"]) / 2
    for stage, seconds in found["stage_s"].items():
        assert found["stage_passes"][stage] * one == pytest.approx(seconds)
    assert found["total_passes"] >= found["stage_passes"]["calibrate"] > 0


def test_a_float_pass_reads_every_image_once():
    seen = []

    class Net:
        def __call__(self, batch):
            seen.append(batch)

    assert float_pass(Net(), [["a", "b"], ["c"]]) >= 0
    assert seen == ["a", "b", "c"]


def test_without_a_recipe_the_usage_is_told(capsys):
    assert stage_cost.main(["dinov2_s"]) == 2
    assert "usage" in capsys.readouterr().err
