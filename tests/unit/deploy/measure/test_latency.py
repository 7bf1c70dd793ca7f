import time

import pytest

from deploy.measure.latency import compare


def test_the_ratio_of_two_sleeps_is_that_of_their_times():
    found = compare(lambda: time.sleep(0.02), lambda: time.sleep(0.01), rounds=9)
    assert found.ratio == pytest.approx(2.0, rel=0.25)
    assert found.low <= found.ratio <= found.high
    assert found.baseline_ms > found.candidate_ms


def test_the_two_run_in_turn():
    order: list[str] = []
    compare(lambda: order.append("a"), lambda: order.append("b"), rounds=3, warmup=1)
    assert order == ["a", "b"] * 4
