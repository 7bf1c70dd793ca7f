import statistics
import time

import numpy as np
import pytest

from deploy.measure.latency import compare, comparison, times_in_turn


def test_the_ratio_of_two_sleeps_is_that_of_their_times():
    found = compare(lambda: time.sleep(0.02), lambda: time.sleep(0.01), rounds=9)
    assert found.ratio == pytest.approx(2.0, rel=0.25)
    assert found.low <= found.ratio <= found.high
    assert found.baseline_ms > found.candidate_ms


def test_the_two_run_in_turn():
    order: list[str] = []
    compare(lambda: order.append("a"), lambda: order.append("b"), rounds=3, warmup=1)
    assert order == ["a", "b"] * 4


def test_any_number_of_calls_run_in_turn():
    order: list[str] = []
    times = times_in_turn([lambda name=name: order.append(name) for name in "abc"], rounds=4, warmup=2)
    assert order == [*"abc"] * 6
    assert times.shape == (4, 3)


def test_the_ratio_is_the_median_of_the_rounds_own_ratios():
    generator = np.random.default_rng(3)
    slow_machine = generator.uniform(1, 10, 21)  # the same for both in one round
    ratios = generator.uniform(1.5, 2.5, 21)
    found = comparison(slow_machine * ratios, slow_machine)
    assert found.ratio == pytest.approx(statistics.median(ratios))
    assert min(ratios) < found.low < found.ratio < found.high < max(ratios)
    assert found.baseline_ms == pytest.approx(statistics.median(slow_machine * ratios))
    assert found.candidate_ms == pytest.approx(statistics.median(slow_machine))
    assert found.rounds == 21
