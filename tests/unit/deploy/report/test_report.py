"""What report.json and the table say of the repairs. Oracle: the figures typed here."""

import pytest
import torch
from torch import nn

from calib.families import Family
from calib.quant_model import QuantModel, StageRecord
from compensation.branch import DenseBranch
from compensation.moments import Fit
from deploy.report.evidence import branch_figures, waterfall
from deploy.report.terminal import _repairs

ERQ = StageRecord("erq", {}, sqnr_before_db=28.0, sqnr_after_db=29.25)
QWT = StageRecord(
    "qwt", {}, sqnr_before_db=29.5, sqnr_after_db=29.4,
    details={"kept": {"b.0": {"form": "shared", "r2_cv": 0.19, "bytes": 10}, "b.1": {"form": "dense", "r2_cv": 0.02}}},
)  # fmt: skip
STAR = StageRecord("qwt_star", {}, details={"kept": {"b.2": {"form": "dense", "bytes": 12}}})
SILENT = StageRecord("calibrate", {})


def as_json(*records):
    return [record.to_json() for record in records]


def model_with(blocks, *records):
    branch = DenseBranch(Fit(torch.zeros(1, 1), torch.zeros(1)))
    net = nn.Identity()
    family = Family("none", frozenset(), frozenset(), "", (), 99.99)
    return QuantModel("m", net, net, net, family, history=records, branches=dict.fromkeys(blocks, branch))


def shown(branches, *records):
    engine = {"kernels": 12, "kernels_without_branches": 11, "bytes": 3_000_000, "bytes_without_branches": 1_500_000}
    return dict(_repairs({"history": as_json(*records), "branches": branches, "engine": engine}))


def test_the_waterfall_starts_at_the_first_judge_and_tells_what_each_step_brings():
    rounded, *steps = waterfall(as_json(SILENT, ERQ, QWT))
    assert (rounded["step"], rounded["sqnr_after_db"], rounded["gain_db"]) == ("rounded", 28.0, None)
    assert [step["step"] for step in steps] == ["erq", "qwt"]
    assert [step["gain_db"] for step in steps] == pytest.approx([1.25, -0.1])
    assert shown({}, SILENT, ERQ, QWT) == {
        "repairs, on other photographs": "float -> rounded 28.0 dB -> erq +1.2 dB -> qwt -0.1 dB"
    }


def test_without_a_repair_there_is_no_row():
    assert waterfall(as_json(SILENT)) == []
    assert shown({}, SILENT) == {}


def test_every_branch_that_runs_has_its_figures_and_no_other():
    found = branch_figures(model_with(["b.0", "b.1", "b.2"], QWT, STAR))
    assert list(found) == ["b.0", "b.1", "b.2"]
    assert found["b.0"] == {"form": "shared", "r2_cv": 0.19, "bytes": 10}
    assert found["b.2"]["bytes"] == 12
    assert branch_figures(model_with(["b.1"], QWT)) == {"b.1": QWT.details["kept"]["b.1"]}


def test_the_branches_row_tells_forms_scores_and_costs():
    found = branch_figures(model_with(["b.0", "b.1", "b.2"], QWT, STAR))
    assert shown(found, QWT)["branches"] == (
        "shared x1, dense x2, R2 0.02 to 0.19 on other photographs; +1 kernels, +1.50 MB"
    )
    untrained = branch_figures(model_with(["b.2"], STAR))
    assert shown(untrained, STAR)["branches"] == "dense x1; +1 kernels, +1.50 MB"
