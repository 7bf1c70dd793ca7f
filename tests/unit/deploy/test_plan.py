"""Which stages run. Oracle: the lists typed here."""

import pytest

from calib.errors import UserError
from deploy.plan import Stage, planned, require_order


def stage(name, reads="", writes=""):
    return Stage(name, "torch", tuple(reads.split()), tuple(writes.split()), lambda _run: ())


STAGES = (
    stage("load", "", "model"),
    stage("calibrate", "model", "model"),
    stage("range", "model", "fp16_range"),
    stage("round", "model", "model"),
    stage("export", "model", "fp16 fp32"),
    stage("parity", "fp32", "parity"),
    stage("build", "fp16", "built"),
    stage("package", "built parity fp16_range", "report"),
)
ALL = [each.name for each in STAGES]

PLANS = {
    (None, None): ALL,
    ("load", None): ALL,
    ("package", None): ALL,
    (None, "range"): ["load", "calibrate", "range"],
    ("range", "range"): ["load", "calibrate", "range"],
    ("round", "round"): ["load", "calibrate", "round"],
    ("round", "export"): ["load", "calibrate", "round", "export"],
    ("build", "build"): ["load", "calibrate", "round", "export", "build"],
}


@pytest.mark.parametrize(("begin", "until"), PLANS, ids=str)
def test_before_the_first_stage_only_those_run_whose_results_are_read(begin, until):
    assert [each.name for each in planned(STAGES, begin, until)] == PLANS[begin, until]


BAD = {
    ("rnge", None): r"--from 'rnge': no such stage in this recipe; expected load, .*package\. Did you mean 'range'\?$",
    (None, "expor"): r"--until 'expor': no such stage in this recipe; .* Did you mean 'export'\?$",
    ("export", "load"): r"--from 'export' comes after --until 'load': expected an earlier stage or the same$",
}


@pytest.mark.parametrize(("begin", "until"), BAD, ids=str)
def test_a_wrong_name_is_told_with_the_nearest(begin, until):
    with pytest.raises(UserError, match=BAD[begin, until]):
        planned(STAGES, begin, until)


def test_a_stage_that_reads_what_nobody_wrote_before_is_a_bug():
    with pytest.raises(ValueError, match="stage 'parity' reads 'fp32', which no stage before it writes"):
        require_order((*STAGES[:4], STAGES[5], STAGES[4]))
    with pytest.raises(ValueError, match="'nothing'"):
        planned((*STAGES, stage("last", "nothing")), None, None)
