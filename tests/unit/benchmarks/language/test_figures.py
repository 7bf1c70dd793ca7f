"""The figures of networks whose logits are known."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.language.figures import Sums, judge
from calib.device import CPU

P = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6]])  # of the token behind each token


class Bigrams(nn.Module):
    """One Linear on one-hot tokens: the logits of what follows are a row of its weight."""

    def __init__(self, probabilities):
        super().__init__()
        self.linear = nn.Linear(3, 3, bias=False)
        self.linear.weight.data = probabilities.log().T

    def forward(self, rows):
        return self.linear(nn.functional.one_hot(rows.long(), 3).float())


IDS = np.array([[0, 1, 1, 2], [2, 2, 0, 0], [1, 0, 2, 2], [0, 0, 0, 1], [2, 1, 1, 1]])


def told_by_hand(p):
    """(loss per text, whether the last token is the likeliest)."""
    loss = [-np.mean([math.log(p[a][b]) for a, b in itertools.pairwise(text)]) for text in IDS.tolist()]
    return np.array(loss), [int(np.argmax(p[text[-2]])) == text[-1] for text in IDS.tolist()]


def test_a_network_of_one_linear_has_the_perplexity_of_its_probabilities():
    other = P[:, [0, 2, 1]]
    exact, net = Bigrams(P), Bigrams(other)
    found = judge(exact, net, IDS, CPU)
    (loss, last), (float_loss, _) = told_by_hand(other.tolist()), told_by_hand(P.tolist())
    assert found.texts == 5
    assert found.perplexity == pytest.approx(math.exp(loss.mean()))
    assert found.last_token == pytest.approx(np.mean(last))
    assert found.loss_more == pytest.approx((loss - float_loss).mean())
    assert found.loss_error == pytest.approx((loss - float_loss).std(ddof=1) / math.sqrt(5))
    assert found.agreement == pytest.approx(np.mean(IDS == 0))  # the likeliest behind 1 and 2 change places
    rows = [P.log().numpy()[IDS], other.log().numpy()[IDS]]
    noise = np.square(rows[1] - rows[0]).sum()
    assert found.sqnr_db == pytest.approx(10 * math.log10(np.square(rows[0]).sum() / noise), abs=1e-4)


def test_a_network_beside_itself_has_no_error():
    found = judge(Bigrams(P), Bigrams(P), IDS, CPU)
    assert (found.agreement, found.loss_more, found.loss_error, found.sqnr_db) == (1.0, 0.0, 0.0, 200.0)


def test_figures_of_one_text_have_no_standard_error():
    sums = Sums()
    logits = P.log().numpy()[IDS[:1]]
    sums.add(logits, logits + 1, IDS[:1])
    assert sums.figures().loss_error == 0.0
