import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from calib.task import Task
from deploy.measure.accuracy import MAX_SQNR_DB, fidelity, joined_rows, mean_cosine, mean_sqnr_db, relative_l2, sqnr_db
from deploy.measure.tasks import task_module
from deploy.measure.tasks.features import nearest_neighbours


def logits(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    reference = generator.normal(size=(40, 10)).astype(np.float32) * 3
    return reference, reference + generator.normal(size=(40, 10)).astype(np.float32)


def test_classifier_figures_equal_torchs():
    reference, output = logits()
    labels = np.arange(40) % 10
    found = fidelity({"output": reference}, {"output": output}, Task("classifier"), labels)
    r, o = torch.from_numpy(reference), torch.from_numpy(output)
    assert found.cosine == pytest.approx(float(F.cosine_similarity(r, o).mean()), rel=1e-6)
    kl = F.kl_div(o.log_softmax(1), r.log_softmax(1), log_target=True, reduction="batchmean")
    assert found.kl == pytest.approx(float(kl), rel=1e-5)
    assert found.top1_agreement == pytest.approx(float((r.argmax(1) == o.argmax(1)).float().mean()))
    assert found.top1 == pytest.approx(float((o.argmax(1) == torch.from_numpy(labels)).float().mean()))
    assert found.reference_top1 == pytest.approx(float((r.argmax(1) == torch.from_numpy(labels)).float().mean()))


def test_sqnr_of_known_noise():
    reference = np.ones((4, 100))
    assert sqnr_db(reference, reference + 0.1) == pytest.approx(20.0)
    assert sqnr_db(reference, reference) == MAX_SQNR_DB
    assert math.isnan(sqnr_db(reference, np.full_like(reference, np.nan)))
    assert relative_l2(reference, reference + 0.1) == pytest.approx(0.1)
    assert relative_l2(0 * reference, 0 * reference) == 0
    assert relative_l2(0 * reference, reference) == np.inf


def test_the_mean_over_images_is_not_decided_by_the_worst_one():
    reference = np.ones((4, 100))
    noise = np.array([0.1, 0.1, 0.1, 1.0])[:, None]
    assert mean_sqnr_db(reference, reference + noise) == pytest.approx(15.0)
    assert sqnr_db(reference, reference + noise) == pytest.approx(5.9, abs=0.05)
    one = np.where(np.arange(4)[:, None] == 2, np.nan, reference)
    assert math.isnan(mean_sqnr_db(reference, one))


def test_nearest_neighbour_is_the_loops_answer():
    rows, _ = logits()
    for i, found in enumerate(nearest_neighbours(rows)):
        others = [j for j in range(len(rows)) if j != i]
        cosine = [rows[i] @ rows[j] / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j]) for j in others]
        assert found == others[int(np.argmax(cosine))]


def test_features_have_no_class_figures():
    reference, output = logits()
    found = fidelity({"output": reference}, {"output": output}, Task("features"))
    assert found.top1_kind == "nearest neighbour"
    assert found.kl is None
    assert found.top1 is None


def test_several_outputs_count_alike_whatever_their_sizes():
    generator = np.random.default_rng(0)
    boxes, scores = 1000 * generator.normal(size=(6, 20, 4)), generator.normal(size=(6, 20))
    worse = {"boxes": boxes, "scores": scores + 0.1 * generator.normal(size=scores.shape)}
    found = fidelity({"boxes": boxes, "scores": scores}, worse, Task("values"))
    assert found.outputs["boxes"] == MAX_SQNR_DB
    assert found.outputs["scores"] == pytest.approx(20, abs=1.5)
    share = 10 * np.log10(5)  # 20 of 100 values an image are scores, and only they have noise
    assert found.sqnr_db == pytest.approx(found.outputs["scores"] + share, abs=0.1)
    assert found.top1_agreement is None


def test_a_single_output_of_any_shape_is_compared_as_it_is():
    picture = np.random.default_rng(0).normal(size=(4, 3, 8, 8))
    np.testing.assert_array_equal(joined_rows({"output": picture}), picture.reshape(4, -1))


def test_rows_that_are_zero_in_both_are_equal():
    exact = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0], [0.0, 0.0]], np.float32)
    found = np.array([[2.0, 0.0], [0.0, 0.0], [0.0, 1.0], [1.0, 0.0]], np.float32)
    assert mean_cosine(exact, found) == pytest.approx(3 / 4)


def test_an_unknown_task_is_no_task():
    with pytest.raises(ValueError, match="expected boxes, classifier, features, pictures, tokens, values"):
        task_module("sounds")
