"""The judge. Oracle: errors summed by hand for every source image, the formula of the standard error, planted networks."""

import dataclasses
import math
import statistics

import pytest
import torch
from torch import nn

from calib.images.batches import Half, Part
from calib.judge.held_out import (
    MARGIN_DB,
    Candidate,
    Errors,
    Gain,
    add_errors,
    challenge,
    choose,
    held_out_errors,
)
from calib.network.rounded_layer import with_biases
from calib.quant_model import QuantModel
from tests.tiny import tiny_model

LAYER = "blocks.1.mlp.fc2"


class Scaled(nn.Module):
    """y = factor x, flattened: a network whose error on an image is known."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x.flatten(1)


def network(factor):
    """A model whose quantized network returns `factor` times what the float network does."""
    exact = Scaled(1.0)
    return dataclasses.replace(QuantModel.of("scaled", exact), net=Scaled(factor))


def part(*values, sources=None):
    """Images of one pixel with these values."""
    return Part([torch.tensor([value]).reshape(1, 1, 1, 1) for value in values], sources)


HALVES = [Half((part(1.0, 2.0), part(3.0))), Half((part(4.0), part(5.0, 6.0)))]
# the images each trial is tried on: [rotation][half] -> those that choose, those that judge
OTHERS = [[((4.0,), (5.0, 6.0)), ((1.0, 2.0), (3.0,))], [((5.0, 6.0), (4.0,)), ((3.0,), (1.0, 2.0))]]


def candidate(name, *factors):
    """`factors`: of the trials (rotation 0 half 0, rotation 0 half 1, rotation 1 half 0, rotation 1 half 1), then whole."""
    models = [None if factor is None else network(factor) for factor in factors]
    return Candidate(name, (tuple(models[:2]), tuple(models[2:4])), models[4])


def test_errors_and_gain_are_those_of_every_source_image():
    sources = [0, 0, 1, 2]
    values = [1.0, 2.0, 3.0, 4.0]
    errors = Errors(2)
    images = torch.tensor(values).reshape(-1, 1, 1, 1)
    numbered = [(0, 0, source) for source in sources]
    errors.add(Scaled(1.0), [Scaled(1.5), lambda x: x.flatten(1) + 0.1], images, numbered)
    first = [(0.5 * value) ** 2 for value in values]
    assert errors.noise == pytest.approx([sum(first), 4 * 0.01], rel=1e-4)
    gains = [
        10 * math.log10(lost / kept) for lost, kept in ((first[0] + first[1], 0.02), (first[2], 0.01), (first[3], 0.01))
    ]
    found = errors.gain(0, 1)
    assert found.mean_db == pytest.approx(statistics.fmean(gains), rel=1e-4)
    assert found.error_db == pytest.approx(statistics.stdev(gains) / math.sqrt(3), rel=1e-4)
    assert found.sources == 3
    signal = sum(value**2 for value in values)
    assert found.before_db == pytest.approx(10 * math.log10(signal / sum(first)), rel=1e-4)
    assert found.after_db == pytest.approx(10 * math.log10(signal / 0.04), rel=1e-4)


def test_crops_of_one_source_image_are_one_piece_of_evidence():
    images = torch.rand(32, 1, 1, 1) + 0.5
    together, apart = Errors(2), Errors(2)
    for errors, sources in ((together, [0] * 31 + [1]), (apart, range(32))):
        errors.add(Scaled(1.0), [Scaled(1.2), Scaled(1.1)], images, [(0, 0, source) for source in sources])
    assert together.gain(0, 1).sources == 2
    assert apart.gain(0, 1).sources == 32


@pytest.mark.parametrize(
    ("gain", "holds"),
    [
        (Gain(10.0, 10.0 + 1.01 * MARGIN_DB, 0.2, 0.1, 4), True),
        (Gain(10.0, 10.0 + MARGIN_DB / 2, 0.2, 0.1, 4), False),  # too small
        (Gain(10.0, 13.0, 1.0, 1.5, 4), False),  # spread over source images
        (Gain(10.0, 13.0, math.nan, 0.1, 4), False),
        (Gain(10.0, math.nan, 1.0, 0.1, 4), False),
    ],
)
def test_a_gain_holds_above_the_margin_and_its_standard_error(gain, holds):
    assert gain.holds is holds


def test_every_trial_runs_on_the_half_it_was_not_fitted_on_and_every_source_image_judges_once():
    for role in (0, 1):
        for rotation in (0, 1):
            errors = Errors(1)
            tried = candidate("a", *[1.0 + step for step in (0.1, 0.2, 0.3, 0.4)], 1.0)
            add_errors(errors, [tried], rotation, ((0, 1), (1, 0))[rotation][role], HALVES)
            expected = sum(
                ((0.1 * (1 + 2 * rotation + half)) * value) ** 2
                for half in (0, 1)
                for value in OTHERS[rotation][half][role]
            )
            assert errors.noise[0] == pytest.approx(expected, rel=1e-4)
    plain, better = (Candidate.unfitted("", network(factor)) for factor in (1.2, 1.1))
    assert held_out_errors([[plain, better]] * 2, HALVES).gain(0, 1).sources == 6


def test_the_best_is_chosen_and_a_tie_goes_to_the_plainer():
    plain, same, better = (Candidate.unfitted(name, network(f)) for name, f in (("p", 1.2), ("s", 1.2), ("b", 1.01)))
    assert choose([plain, same, better], HALVES) == ([2, 2], 2)
    assert choose([plain, same], HALVES) == ([0, 0], 0)
    by_rotation = candidate("r", 1.01, 1.01, 1.5, 1.5, 1.01)  # good where the first parts choose, bad elsewhere
    assert choose([plain, by_rotation], HALVES)[0] == [1, 0]


def test_a_better_candidate_stays_and_a_worse_one_is_dropped_with_its_figures():
    plain, better = (Candidate.unfitted(name, network(factor)) for name, factor in (("plain", 1.2), ("better", 1.1)))
    kept, gain, note = challenge(plain, [better], HALVES)
    assert kept is better
    assert gain.after_db - gain.before_db == pytest.approx(20 * math.log10(2), rel=1e-3)
    assert note == f"better: {gain.text()}"
    kept, gain, note = challenge(better, [plain], HALVES)
    assert kept is better
    assert gain.after_db == gain.before_db
    assert note.startswith("dropped: plain: output SQNR ")


def test_what_gains_on_the_images_that_choose_alone_is_dropped():
    plain = Candidate.unfitted("plain", network(1.2))
    lucky = tuple(
        tuple(dataclasses.replace(network(1.0), net=Lucky(OTHERS[rotation][half][0])) for half in (0, 1))
        for rotation in (0, 1)
    )
    tuned = Candidate("tuned", lucky, network(1.2))
    assert choose([plain, tuned], HALVES) == ([1, 1], 1)
    kept, _, note = challenge(plain, [tuned], HALVES)
    assert kept is plain
    assert note.startswith("dropped: tuned")


class Lucky(Scaled):
    """No error on the images it was chosen on, a large one on others."""

    def __init__(self, known):
        super().__init__(1.0)
        self.known = torch.tensor(known)

    def forward(self, x):
        rows = x.flatten(1)
        return torch.where((rows - self.known).abs().min(1, keepdim=True).values < 1e-6, rows, 2 * rows)


def test_the_plainer_stays_where_the_gain_differs_more_between_source_images_than_it_is():
    class Uneven(nn.Module):
        """Far better on the largest image, worse on the others: a gain over all images together, not over most."""

        def forward(self, x):
            rows = x.flatten(1)
            return torch.where(rows.abs() > 5.5, rows, 1.25 * rows)

    plain = Candidate.unfitted("plain", network(1.2))
    uneven = Candidate.unfitted("uneven", dataclasses.replace(network(1.0), net=Uneven()))
    kept, gain, _ = challenge(plain, [uneven], HALVES)
    assert gain.mean_db > 0  # the one image outweighs the others
    assert gain.mean_db < gain.error_db
    assert kept is plain


def test_a_candidate_that_is_worse_when_fitted_on_all_images_is_dropped():
    plain = Candidate.unfitted("plain", network(1.2))
    broken = candidate("broken", 1.1, 1.1, 1.1, 1.1, 1.5)
    kept, _, note = challenge(plain, [broken], HALVES)
    assert kept is plain
    assert "but fitted on all images" in note


def test_a_trial_that_was_not_made_is_left_out():
    plain = Candidate.unfitted("plain", network(1.2))
    once = candidate("once", 1.1, None, None, None, 1.1)
    kept, gain, _ = challenge(plain, [once], HALVES)
    assert kept is once
    assert gain.sources == 2  # part 1 of the second half


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_network_without_numbers_never_stays(factor):
    plain, broken = (Candidate.unfitted(name, network(f)) for name, f in (("plain", 1.2), ("broken", factor)))
    kept, _, note = challenge(plain, [broken], HALVES)
    assert kept is plain
    assert note.startswith("dropped: broken")
    assert choose([plain, broken], HALVES)[1] == 0


def test_without_challengers_nothing_is_judged():
    plain = Candidate.unfitted("plain", network(1.2))
    assert challenge(plain, [], HALVES) == (plain, None, "")


def test_nets_that_share_weights_are_judged_as_quantized():
    """A real network: wrong biases are told from right ones."""
    model = tiny_model("vit")
    wrong = dataclasses.replace(model, net=with_biases(model.net, {LAYER: torch.full((48,), 0.5)}))
    halves = [Half((Part([torch.randn(2, 3, 32, 32)]), Part([torch.randn(2, 3, 32, 32)]))) for _ in range(2)]
    kept, gain, _ = challenge(Candidate.unfitted("wrong", wrong), [Candidate.unfitted("right", model)], halves)
    assert kept.name == "right"
    assert gain.after_db > gain.before_db + 20
