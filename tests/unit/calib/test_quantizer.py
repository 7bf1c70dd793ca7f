import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from calib.quantizer import (
    SMALLEST_SCALE,
    QParams,
    dequantize,
    fp16_scale,
    qparams_from_amax,
    quantize,
)

values = arrays(np.float32, st.integers(1, 40), elements=st.floats(-1e4, 1e4, width=32))


def by_hand(x: float, scale: float, low: int) -> int:
    """Round half to even in exact rational arithmetic, then clamp."""
    from fractions import Fraction

    return max(low, min(127, round(Fraction(float(np.float32(x) / np.float32(scale))))))


@given(values, st.floats(1e-3, 10))
def test_integers_are_those_of_exact_round_half_even(x, scale):
    params = QParams(fp16_scale(torch.tensor(scale)))
    expected = [by_hand(v, float(params.scale), -128) for v in x]
    assert quantize(torch.from_numpy(x), params).tolist() == expected


@given(values, st.floats(1e-3, 10))
def test_rounding_twice_is_rounding_once(x, scale):
    params = QParams(fp16_scale(torch.tensor(scale)))
    once = params.fake_quantize(torch.from_numpy(x))
    assert torch.equal(params.fake_quantize(once), once)


@given(values)
def test_error_is_at_most_half_a_step_inside_the_range(x):
    tensor = torch.from_numpy(x)
    params = qparams_from_amax(tensor.abs().max())
    inside = tensor.abs() <= 127 * params.scale
    error = (params.fake_quantize(tensor) - tensor).abs()[inside]
    assert (error <= params.scale / 2 * (1 + 1e-5)).all()


def test_ties_go_to_the_even_integer():
    params = QParams(torch.tensor(1.0))
    assert quantize(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]), params).tolist() == [0, 2, 2, 0, -2]


def test_narrow_range_never_reaches_minus_128():
    x = torch.tensor([-1000.0, 1000.0])
    assert quantize(x, QParams(torch.tensor(1.0), narrow=True)).tolist() == [-127, 127]
    assert quantize(x, QParams(torch.tensor(1.0))).tolist() == [-128, 127]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_per_channel_equals_a_loop_of_per_tensor(axis):
    x = torch.randn(3, 4, 5)
    params = qparams_from_amax(x.abs().amax([d for d in range(3) if d != axis]), axis=axis)
    for channel in range(x.shape[axis]):
        alone = quantize(x.select(axis, channel), QParams(params.scale[channel]))
        assert torch.equal(quantize(x, params).select(axis, channel), alone)


def test_scales_are_exact_in_fp16_and_never_too_small():
    scale = fp16_scale(torch.tensor([0.0, 1e-9, 0.1, 3.3]))
    assert torch.equal(scale, scale.half().float())
    assert float(scale.min()) == SMALLEST_SCALE


def test_dequantize_is_integer_times_scale():
    params = QParams(torch.tensor([0.5, 2.0]), axis=0)
    assert dequantize(torch.tensor([[2, -3], [2, -3]], dtype=torch.int8), params).tolist() == [
        [1, -1.5],
        [4, -6],
    ]


def test_a_scale_that_fp16_cannot_hold_stays_as_it_is():
    scales = torch.tensor([65504.0, 65520.0, 3e7])
    assert fp16_scale(scales).tolist() == [65504.0, 65520.0, 3e7]
    assert fp16_scale(torch.tensor(0.1)).item() == float(torch.tensor(0.1).half())
