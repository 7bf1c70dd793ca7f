"""Thresholds of least entropy (their values are tried in test_observers.py) on the device of the histogram."""

import torch

from calib.statistics.entropy import entropy_amax
from tests.other_device import OTHER, other_device


def test_the_histogram_decides_the_device_whatever_the_default_one_is():
    """A library may hide torch.linspace from the default device, as transformers does while it builds a network."""
    edges = torch.linspace(0, 4, 301, dtype=torch.float64)
    bins = edges[:-1], edges[1:], torch.exp(-edges[1:].square()) * 1000
    with other_device():
        found = entropy_amax(*(each.to(OTHER) for each in bins), amax=4.0)
    assert found == entropy_amax(*bins, amax=4.0)
