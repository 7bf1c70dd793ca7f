"""Limits are read as they are meant, kept and broken at the right figures, and refused where they cannot be measured."""

import pytest
import torch

from calib.errors import TooFewError, UserError
from calib.task import Boxes, Task
from deploy.acceptance import Acceptance, Limits, MaxDrop, keeps
from deploy.measure.accuracy import Fidelity
from deploy.measure.latency import Comparison

SPEED = Comparison(ratio=1.9, low=1.8, high=2.0, baseline_ms=19.0, candidate_ms=10.0, rounds=15)


def measured(**figures):
    return Fidelity(count=200, sqnr_db=30.0, cosine=1.0, **figures)


@pytest.mark.parametrize(
    ("text", "amount", "unit"), [("1%", 1, "%"), ("0.5 %", 0.5, "%"), ("30dB", 30, "dB"), (" 28.5 db ", 28.5, "dB")]
)
def test_a_limit_on_accuracy_is_read(text, amount, unit):
    assert MaxDrop.from_text(text) == MaxDrop(amount, unit)


@pytest.mark.parametrize("text", ["1", "-1%", "nan%", "infdB", "1e9999dB", "%", "1 percent", "1%2"])
def test_other_texts_are_refused_with_both_forms(text):
    with pytest.raises(UserError, match=r"expected 1% .* or 30dB"):
        MaxDrop.from_text(text)


@pytest.mark.parametrize("text", ["100%", "200 %"])
def test_a_share_that_everything_keeps_is_refused(text):
    with pytest.raises(UserError, match="expected a percentage below 100"):
        MaxDrop.from_text(text)


@pytest.mark.parametrize(("limit", "enough"), [("1%", 100), ("0.5%", 200), ("3%", 34), ("0%", 1), ("30dB", 1)])
def test_a_share_smaller_than_one_image_cannot_be_shown(limit, enough):
    wanted = MaxDrop.from_text(limit)
    wanted.require_images(enough, "classifier", given=True)
    if enough > 1:
        with pytest.raises(UserError, match=f"expected {enough} or more in EVAL=$"):
            wanted.require_images(enough - 1, "classifier", given=True)
        with pytest.raises(UserError, match=f"held out of CALIB= .* expected {enough} or more in EVAL=, or in CALIB="):
            wanted.require_images(enough - 1, "features", given=False)
        wanted.require_images(enough - 1, "boxes", given=True)


@pytest.mark.parametrize(
    ("limit", "figures", "kept", "said", "task"),
    [
        ("30dB", {}, True, "SQNR 30.0 dB on 200 images, expected 30 or more", "values"),
        ("30.1dB", {}, False, "expected 30.1 or more", "classifier"),
        ("44dB", {"psnr_db": 44.1}, True, "PSNR 44.1 dB on 200 images", "pictures"),
        ("44dB", {"psnr_db": 43.9}, False, "PSNR 43.9 dB on 200 images", "pictures"),
        ("1%", {"top1": 0.74, "reference_top1": 0.75}, True, "falls by 1.00 points on 200 images", "classifier"),
        (
            "1%",
            {"top1": 0.735, "reference_top1": 0.75, "top1_agreement": 1.0},
            False,
            "falls by 1.50 points",
            "classifier",
        ),
        ("0%", {"top1": 0.76, "reference_top1": 0.75}, True, "falls by -1.00 points", "classifier"),
        ("1%", {"top1_agreement": 0.99}, True, "1.00 % of the top-1 results differ on 200 images", "features"),
        ("1%", {"top1_agreement": 0.985}, False, "1.50 % of the top-1 results differ", "tokens"),
        ("1%", {"boxes": 9, "ap50": 0.99, "ap": 0.7}, True, "is 1.00 points below 100 on 200 images", "boxes"),
        ("1%", {"boxes": 9, "ap50": 0.98, "ap": 0.7}, False, "is 2.00 points below 100", "boxes"),
        ("1%", {"ap50": 0.98, "true_ap": 0.375, "reference_true_ap": 0.38}, True, "falls by 0.50 points", "boxes"),
        ("1%", {"ap50": 1.0, "true_ap": 0.36, "reference_true_ap": 0.38}, False, "falls by 2.00 points", "boxes"),
        ("1%", {"ap50": 1.0, "true_ap": 0.0, "reference_true_ap": 0.0}, True, "is 0.00 points below 100", "boxes"),
        ("1%", {"ap50": 0.5, "true_ap": 0.0, "reference_true_ap": 0.0}, False, "is 50.00 points below 100", "boxes"),
        ("1%", {"boxes": 0}, False, "the float network is certain of no box on 200 images", "boxes"),
    ],
)
def test_what_a_limit_is_about_depends_on_the_task(limit, figures, kept, said, task):
    acceptance = Limits(MaxDrop.from_text(limit)).check(measured(**figures), task, SPEED)
    assert acceptance.accepted is kept
    (line,) = acceptance.lines()
    assert line.startswith(f"{'PASS' if kept else 'FAIL'} MAX_DROP={limit}: ")
    assert said in line


def test_what_is_not_a_number_keeps_no_limit():
    found = Fidelity(count=2, sqnr_db=float("nan"), cosine=0.0, top1_agreement=float("nan"))
    assert not Limits(MaxDrop(0, "dB")).check(found, "classifier", SPEED).accepted
    assert not Limits(MaxDrop(99, "%")).check(found, "classifier", SPEED).accepted


@pytest.mark.parametrize(("least", "kept"), [(1.8, True), (1.85, False), (1.9, False)])
def test_a_speed_is_kept_only_if_the_whole_interval_lies_above_it(least, kept):
    acceptance = Limits(min_speedup=least).check(measured(), "classifier", SPEED)
    assert acceptance.accepted is kept
    assert (
        f"1.90x the float network (95 %: 1.80 to 2.00), expected the whole interval at {least:g} or above"
        in acceptance.lines()[0]
    )


def test_one_broken_limit_is_enough():
    acceptance = Limits(MaxDrop(20, "dB"), 3.0).check(measured(), "classifier", SPEED)
    assert [check.kept for check in acceptance.checks] == [True, False]
    assert acceptance.to_json()["accepted"] is False


def test_without_limits_everything_is_accepted():
    assert Limits().check(measured(), "classifier", SPEED) == Acceptance()
    assert Acceptance().accepted


def test_what_cannot_be_measured_is_refused_at_once():
    for task in ("values", "pictures"):
        with pytest.raises(UserError, match="so nothing is counted; expected decibels, such as MAX_DROP=30dB"):
            MaxDrop(1, "%").require_measurable(task)
        MaxDrop(1, "dB").require_measurable(task)
    for task in ("classifier", "features", "tokens", "boxes"):
        MaxDrop(1, "%").require_measurable(task)
    with pytest.raises(UserError, match=r"times engines of TARGET=onnxruntime alone, not of tensorrt_rtx"):
        Limits(min_speedup=1.5).require_timed("tensorrt_rtx")
    Limits(min_speedup=1.5).require_timed("onnxruntime")
    Limits().require_timed("tensorrt")


def test_outputs_are_held_to_a_limit_by_their_task():
    exact, other = torch.eye(4), torch.eye(4)
    other[0] = torch.tensor([0.0, 2.0, 0.0, 0.0])
    held = lambda amount, unit, task, found, sources: keeps(  # noqa: E731
        MaxDrop(amount, unit), task, {"output": exact}, {"output": found}, sources
    )
    with pytest.raises(TooFewError, match="4 images that calibration can spare cannot show it, 5 could"):
        held(20, "%", Task("classifier"), exact, range(4))
    assert held(47, "%", Task("classifier"), other, range(4))  # 25 %, and sqrt(0.25 * 0.75 / 4) more
    assert not held(46, "%", Task("classifier"), other, range(4))
    assert not held(47, "%", Task("classifier"), other, [0, 0, 1, 1])
    assert held(25, "%", Task("classifier"), exact, range(4))
    assert not held(10, "dB", Task("values"), other, range(4))
    spread = exact * torch.tensor([1.1, 1.1, 1.1, 1.3])[:, None]  # 15 dB together, 20 dB and 10 dB one by one
    assert held(12, "dB", Task("values"), spread, [0, 0, 1, 1])
    assert not held(14.9, "dB", Task("values"), spread, [0, 0, 1, 1])
    assert held(14.9, "dB", Task("values"), spread, [0, 0, 0, 0])


def test_tokens_are_counted_at_every_place():
    exact = torch.eye(3)[None].repeat(4, 1, 1)  # 4 texts of 3 places, 3 tokens
    other = exact.clone()
    other[0, 0] = torch.tensor([0.0, 2.0, 0.0])  # one of twelve
    held = lambda amount: keeps(MaxDrop(amount, "%"), Task("tokens"), {"y": exact}, {"y": other}, range(4))  # noqa: E731
    share = 1 / 12
    least = 100 * (share + (share * (1 - share) / 4) ** 0.5)  # 22 %
    with pytest.raises(TooFewError):
        held(least + 0.01)
    exact, other = (each.repeat(2, 1, 1) for each in (exact, other))
    held = lambda amount: keeps(MaxDrop(amount, "%"), Task("tokens"), {"y": exact}, {"y": other}, range(8))  # noqa: E731
    least = 100 * (share + (share * (1 - share) / 8) ** 0.5)
    assert held(least + 0.01)
    assert not held(least - 0.01)


def test_boxes_are_held_to_a_limit_by_their_average_precision():
    boxes = Boxes("corners", (64, 64), 1)
    scores = torch.tensor([[[2.0], [2.0]]] * 2)  # two certain boxes in each of two images
    places = torch.tensor([[[0.0, 0, 20, 20], [30, 30, 60, 60]]] * 2)
    exact = {"scores": scores, "boxes": places}
    lost = {"scores": scores.clone(), "boxes": places}
    lost["scores"][0, 1] = -20.0
    held = lambda amount, found: keeps(MaxDrop(amount, "%"), Task("boxes", boxes), exact, found, range(2))  # noqa: E731
    assert held(25, exact)
    with pytest.raises(TooFewError, match="4 boxes that calibration can spare cannot show it, 5 could"):
        held(20, exact)
    assert not held(50, lost)  # a fourth of the boxes, and a standard error of two sources
    assert held(60, lost)
