"""Selection under a budget. Oracle: trying every combination."""

import itertools

import pytest

from compensation.select import Option, front, select


def options():
    """Three blocks with a free form, and a dense one that gains more for a kernel."""
    gains = {"a": (0.2, 0.5), "b": (0.3, 0.32), "c": (0.0, 0.4)}
    found = [Option(block, "shared", free, 1.0, 0, 100) for block, (free, _) in gains.items() if free]
    return found + [Option(block, "dense", dense, 1.0, 1, 200) for block, (_, dense) in gains.items()]


def best_gain(choices, max_kernels, max_bytes):
    blocks = sorted({one.block for one in choices})
    per_block = [[None, *(one for one in choices if one.block == block)] for block in blocks]
    gains = [
        sum(one.gain for one in picks if one)
        for picks in itertools.product(*per_block)
        if sum(one.kernels for one in picks if one) <= max_kernels
        and sum(one.bytes for one in picks if one) <= max_bytes
    ]
    return max(gains)


@pytest.mark.parametrize("max_kernels", range(4))
def test_greedy_selection_finds_the_best_under_a_kernel_budget(max_kernels):
    chosen = select(options(), 0.0, max_kernels)
    assert sum(one.kernels for one in chosen.values()) <= max_kernels
    assert sum(one.gain for one in chosen.values()) == pytest.approx(best_gain(options(), max_kernels, 10**9))


def test_without_kernels_only_free_forms_are_taken():
    assert {name: one.form for name, one in select(options(), 0.05, 0).items()} == {"a": "shared", "b": "shared"}


def test_a_kernel_must_bring_its_price():
    assert {name: one.form for name, one in select(options(), 0.05).items()} == {
        "a": "dense",
        "b": "shared",
        "c": "dense",
    }
    assert select(options(), 0.35)["a"].form == "shared"
    assert "c" in select(options(), 0.35)


@pytest.mark.parametrize("max_bytes", [0, 100, 200, 300, 500])
def test_bytes_are_never_exceeded(max_bytes):
    assert sum(one.bytes for one in select(options(), 0.0, max_bytes=max_bytes).values()) <= max_bytes


def test_the_front_rises_with_the_kernels():
    points = front(options(), 0.05)
    assert [point["kernels"] for point in points] == [0, 1, 2]
    assert all(later["r2"] > earlier["r2"] for earlier, later in itertools.pairwise(points))
    assert points[-1]["r2"] == pytest.approx((0.5 + 0.3 + 0.4) / 3)


def test_nothing_to_choose_from():
    assert select([], 0.0) == {}
    assert front([], 0.0) == []


def test_what_makes_it_worse_is_never_taken():
    assert select([Option("a", "shared", -0.1, 1.0, 0, 0)], 0.0) == {}
