"""PSNR and SSIM of pictures, against figures by hand."""

import numpy as np
import pytest

from calib.task import Task
from deploy.measure.accuracy import fidelity
from deploy.measure.tasks.pictures import MOST_DB, out_of_range, psnr_db, ssim


def test_the_psnr_is_the_mean_over_pictures_of_what_lies_in_range():
    reference = np.full((2, 3, 8, 8), 0.5, np.float32)
    output = reference.copy()
    output[0] += 0.1  # 20 dB
    output[1] += 0.01  # 40 dB
    assert psnr_db(reference, output) == pytest.approx(30, abs=1e-3)
    assert psnr_db(reference, reference) == MOST_DB
    assert psnr_db(reference + 0.5, reference + 7) == MOST_DB  # both are white


def test_the_similarity_is_one_of_equal_pictures_and_less_of_others():
    reference = np.random.default_rng(0).random((2, 3, 16, 16), np.float32)
    assert ssim(reference, reference) == pytest.approx(1)
    assert ssim(reference, 1 - reference) < 0.1


def test_pictures_are_measured_in_their_own_shape():
    reference = np.random.default_rng(0).random((2, 3, 16, 16), np.float32)
    found = fidelity({"output": reference}, {"output": reference * np.float32(0.99)}, Task("pictures"))
    assert found.psnr_db == pytest.approx(psnr_db(reference, reference * np.float32(0.99)))
    assert found.sqnr_db == pytest.approx(40, abs=0.1)
    assert found.ssim > 0.99
    assert found.top1_agreement is None


def test_pictures_smaller_than_the_window_have_no_structural_similarity():
    small = np.random.default_rng(0).random((2, 3, 4, 9)).astype(np.float32)
    found = fidelity({"output": small}, {"output": small}, Task("pictures"))
    assert found.ssim is None
    assert found.psnr_db == 100


def test_values_beyond_the_range_of_pictures_are_counted():
    pictures = np.array([-0.2, -0.05, 0, 0.5, 1, 1.05, 1.2, 255], np.float32)
    assert out_of_range(pictures) == 3 / 8
