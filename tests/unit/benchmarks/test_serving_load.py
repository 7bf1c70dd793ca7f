"""The load on a server: wrong and lost answers are counted, and memory is that of the process with its descendants."""

import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks.serving_load import Until, equal, holds, load, resident_mb

IMAGES = np.arange(6, dtype=np.float32).reshape(6, 1)
EXPECTED = [{"output": 2 * IMAGES[index : index + 1]} for index in range(6)]


def right(images):
    return {"output": 2 * images}


def test_right_answers_are_counted_and_timed():
    def slow(images):
        time.sleep(0.001)
        return right(images)

    found = load([lambda: slow] * 3, IMAGES, EXPECTED, Until(requests=50))
    assert (found["requests"], found["wrong"], found["lost"]) == (50, 0, 0)
    assert 1 <= found["p50_ms"] <= found["p99_ms"]


def test_wrong_and_lost_answers_are_told_apart():
    def sometimes(images):
        if images[0, 0] == 1:
            raise ConnectionError("reset\nby peer")
        return right(images) if images[0, 0] != 2 else {"output": images}

    found = load([lambda: sometimes], IMAGES, EXPECTED, Until(requests=12))
    assert (found["requests"], found["wrong"], found["lost"]) == (12, 2, 2)
    assert found["reasons"] == ["reset by peer"]


def test_clients_stop_after_their_time():
    def slow(images):
        time.sleep(0.01)
        return right(images)

    found = load([lambda: slow] * 2, IMAGES, EXPECTED, Until(seconds=0.3))
    assert 2 <= found["requests"] <= 70
    assert 0.3 <= found["seconds"] < 2


@pytest.mark.parametrize("other", [{}, {"other": IMAGES}, {"output": IMAGES + 1e-7}])
def test_equal_means_every_bit_of_every_output(other):
    assert equal({"output": IMAGES}, {"output": IMAGES.copy()})
    assert not equal(other, {"output": IMAGES})


def test_memory_is_that_of_a_process_and_what_it_started():
    child = "import time; held = bytearray(80 << 20); print(flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        found = resident_mb(process.pid)
        subprocess.run(["pkill", "-P", str(process.pid)], check=True)
    assert 80 < found < 160


def test_one_answer_that_differs_is_a_failure():
    good = {"requests": 10, "wrong": 0, "lost": 0}
    row = {"equal_over_http": "200 of 200", "equal_over_grpc": "200 of 200", "load": good}
    assert holds(row)
    assert not holds(row | {"equal_over_grpc": "199 of 200"})
    assert not holds(row | {"load": good | {"lost": 1}})
    assert not holds(row | {"many": good | {"wrong": 1}})
