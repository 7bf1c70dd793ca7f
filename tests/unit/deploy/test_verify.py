"""What a package of FP16 types has to reach."""

import numpy as np
import pytest

from deploy.verify import FP16_NOISE_DB, MAX_FP16_LOSS_DB, Verdict, least_fp16_db


@pytest.mark.parametrize("db", [5.0, 16.0, 25.0])
def test_beside_much_int8_noise_fp16_may_cost_what_flips_do(db):
    assert least_fp16_db(db) == pytest.approx(db - MAX_FP16_LOSS_DB)


@pytest.mark.parametrize("db", [34.0, 36.0, 60.0, float("inf")])
def test_beside_little_int8_noise_fp16_may_add_its_own(db):
    signal, generator = 1.0, np.random.default_rng(0)
    noise = generator.normal(0, 10 ** (-db / 20), 1_000_000) + generator.normal(
        0, 10 ** (-FP16_NOISE_DB / 20), 1_000_000
    )
    assert least_fp16_db(db) == pytest.approx(10 * np.log10(signal / np.square(noise).mean()), abs=0.02)


@pytest.mark.parametrize("overflown", [float("nan"), float("-inf"), 12.0])
def test_overflow_is_a_failure_and_a_perfect_graph_is_none(overflown):
    def verdict(fp32, fp16):
        return Verdict(fidelity=None, fp32_sqnr_db=fp32, fp16_sqnr_db=fp16)

    assert "look for overflow" in verdict(30.0, overflown).failure()
    assert verdict(30.0, 29.0).failure() is None
    assert verdict(30.0, 31.0).failure() is None
    assert verdict(float("inf"), float("inf")).failure() is None
