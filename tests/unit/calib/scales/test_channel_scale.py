import pytest
import torch

from calib.quantizer import qparams_from_amax, qparams_from_range
from calib.scales.channel_scale import channel_scale, fold_scale
from calib.structure.moves import Moved


def extremes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.amin(0), x.amax(0)


def two_halves():
    """Rows (T, C) of two halves whose channels reach differently far, none of them around 0."""
    torch.manual_seed(0)
    reach = torch.logspace(-1, 1, 6)
    return [torch.randn(50, 6) * reach * torch.rand(6).add(0.5) + reach * torch.randn(6) for _ in range(2)]


@pytest.mark.parametrize("centred", [False, True])
def test_a_half_rounds_as_if_it_alone_had_equalised(centred):
    first, second = two_halves()
    scale, shift = channel_scale(*extremes(torch.cat([first, second])), 0.7, centred)
    ours, theirs = ((rows - shift) / scale for rows in (first, second))
    found = fold_scale(*extremes(ours), Moved("p", ("c",), scale, shift), 0.7, centred)

    alone, centre = channel_scale(*extremes(first), 0.7, centred)
    own, other = ((rows - centre) / alone for rows in (first, second))
    threshold = 0.8 * float(ours.abs().max())
    assert found.widening == pytest.approx(float(own.abs().max() / ours.abs().max()), rel=1e-4)
    fake_quantized = qparams_from_amax(torch.tensor(threshold * found.widening)).fake_quantize(other)
    expected = (fake_quantized * alone + centre - shift) / scale
    back = found.fake_quantize(theirs, threshold, 8, -1)
    torch.testing.assert_close(back, expected, rtol=1e-3, atol=0.02 * threshold)


def test_a_half_with_zero_points_rounds_between_its_own_ends():
    first, second = (rows.abs() for rows in two_halves())
    scale, shift = channel_scale(*extremes(torch.cat([first, second])), 0.7, centred=False)
    ours, theirs = first / scale, second / scale
    found = fold_scale(*extremes(ours), Moved("p", ("c",), scale, shift), 0.7, centred=False, zero_points=True)
    alone, _ = channel_scale(*extremes(first), 0.7, centred=False)
    threshold = 0.8 * float(ours.max())
    top = threshold * float((first / alone).max() / ours.max())
    grid = qparams_from_range(torch.tensor(0.0), torch.tensor(top), bits=4)
    expected = grid.fake_quantize(second / alone) * alone / scale
    torch.testing.assert_close(
        found.fake_quantize(theirs, threshold, 4, -1), expected, rtol=1e-3, atol=1e-3 * threshold
    )
    assert fold_scale(*extremes(ours), None, 0.0, centred=False, zero_points=True).sides == (0.0, 1.0)


def test_by_its_own_scale_a_half_shows_how_far_the_other_exceeds_it():
    torch.manual_seed(0)
    first, second = torch.rand(100, 8), torch.rand(100, 8)
    first[0, 0], second[0, 1] = 3.0, 3.0  # each fires in a channel where the other does not
    scale, shift = channel_scale(*extremes(torch.cat([first, second])), 0.9, centred=False)
    ours, theirs = first / scale, second / scale
    assert float(theirs.max() / ours.max()) < 1.1  # by the scale of both, neither exceeds the other
    found = fold_scale(*extremes(ours), Moved("p", ("c",), scale, shift), 0.9, centred=False)
    own, other = (float((rows * found.factor).max()) for rows in (ours, theirs))
    assert other > 2 * own


def test_what_did_not_move_rounds_as_it_is():
    x = torch.randn(20, 4)
    found = fold_scale(*extremes(x), None, 0.0, centred=False)
    grid = qparams_from_amax(torch.tensor(1.0))
    torch.testing.assert_close(found.fake_quantize(x, 1.0, 8, -1), grid.fake_quantize(x))
    maps = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(found.fake_quantize(maps, 1.0, 8, 1), grid.fake_quantize(maps))
