"""The measures of a language model: every place of every text counts alike."""

import numpy as np
import pytest
import torch

from calib.errors import UserError
from calib.outputs import Output, task_of
from calib.task import TOKENS, VALUES, Task
from deploy.measure.accuracy import fidelity
from deploy.measure.tasks.tokens import perplexity


def test_the_next_token_is_compared_at_every_place():
    generator = np.random.default_rng(0)
    exact = generator.normal(size=(3, 4, 7)).astype(np.float32)
    other = exact.copy()
    other[1, 2] = np.roll(other[1, 2], 1)
    found = fidelity({"output": exact}, {"output": other}, Task(TOKENS))
    assert (found.top1_agreement, found.top1_kind) == (pytest.approx(11 / 12), "next token")
    (p, q) = (np.exp(rows[1, 2].astype(float)) / np.exp(rows[1, 2].astype(float)).sum() for rows in (exact, other))
    assert found.kl == pytest.approx(float((p * np.log(p / q)).sum()) / 12)
    assert found.top1 is None


class Says:
    returns_tokens = True


def test_a_network_says_that_its_outputs_are_tokens():
    assert task_of(Says(), (Output("output", (12, 50)),)) == Task(TOKENS)
    assert task_of(object(), (Output("output", (12, 50)),)) == Task(VALUES)
    with pytest.raises(UserError, match=r"Says.returns_tokens is set: expected one output .*, it returns a .*, b "):
        task_of(Says(), (Output("a", (12, 50)), Output("b", (12, 50))))


def test_perplexity_is_torchs_and_leaves_out_what_fills_up():
    generator = np.random.default_rng(0)
    logits, ids = generator.normal(size=(2, 5, 7)), generator.integers(0, 7, (2, 5))
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    losses = [
        torch.nn.functional.cross_entropy(
            torch.from_numpy(rows[: count - 1]), torch.from_numpy(row[1:count]), reduction="sum"
        )
        for rows, row, count in zip(logits, ids, mask.sum(1), strict=True)
    ]
    assert perplexity(logits, ids, mask) == pytest.approx(float(torch.exp(sum(losses) / 6)))


def test_what_can_be_told_has_the_perplexity_of_its_probabilities():
    logits = np.log(np.array([[[1.0, 3.0], [4.0, 1.0], [9.0, 1.0]]]))
    ids = np.array([[0, 1, 0]])  # probabilities 3/4 and 4/5; the last logits tell nothing that is known
    assert perplexity(logits, ids, np.ones_like(ids)) == pytest.approx((3 / 4 * 4 / 5) ** -0.5)
