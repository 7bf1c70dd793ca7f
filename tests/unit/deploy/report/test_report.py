"""What report.json and the table say of the repairs. Oracle: the figures typed here."""

import pytest

from calib.quant_model import StageRecord
from deploy.report.evidence import waterfall
from deploy.report.terminal import _repairs

ERQ = StageRecord("erq", {}, sqnr_before_db=28.0, sqnr_after_db=29.25)
QWT = StageRecord("qwt", {}, sqnr_before_db=29.5, sqnr_after_db=29.4)
SILENT = StageRecord("calibrate", {})


def as_json(*records):
    return [record.to_json() for record in records]


def shown(branches, *records):
    engine = {"kernels": 12, "kernels_without_branches": 11, "bytes": 3_000_000, "bytes_without_branches": 1_500_000}
    return dict(_repairs({"history": as_json(*records), "branches": branches, "engine": engine}))


def test_the_waterfall_starts_at_the_first_judge_and_tells_what_each_step_brings():
    rounded, *steps = waterfall(as_json(SILENT, ERQ, QWT))
    assert (rounded["step"], rounded["sqnr_after_db"], rounded["gain_db"]) == ("rounded", 28.0, None)
    assert [step["step"] for step in steps] == ["erq", "qwt"]
    assert [step["gain_db"] for step in steps] == pytest.approx([1.25, -0.1])
    assert shown({}, SILENT, ERQ, QWT) == {
        "stages, on held-out images": "float -> rounded 28.0 dB -> erq +1.2 dB -> qwt -0.1 dB"
    }


def test_without_a_repair_there_is_no_row():
    assert waterfall(as_json(SILENT)) == []
    assert shown({}, SILENT) == {}


def test_the_branches_row_tells_forms_scores_and_costs():
    untrained = {"b.2": {"form": "dense", "bytes": 12}}
    found = {"b.0": {"form": "shared", "r2_cv": 0.19}, "b.1": {"form": "dense", "r2_cv": 0.02}} | untrained
    assert shown(found, QWT)["branches"] == (
        "shared x1, dense x2, R2 0.02 to 0.19 on held-out images; +1 kernels, +1.50 MB"
    )
    assert shown(untrained)["branches"] == "dense x1; +1 kernels, +1.50 MB"
