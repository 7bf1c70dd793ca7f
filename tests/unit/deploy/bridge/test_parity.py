"""The limits of what simulation and graph may differ by; what they compare is tested in tests/contract/test_export.py."""

import pytest

from deploy.bridge.parity import Deviation


@pytest.mark.parametrize(("differ", "integers", "steps", "beyond"), [
    (2, 384, 1, False), (3, 384, 1, True), (5, 5000, 1, False), (6, 5000, 1, True), (1, 384, 2, True), (0, 9, 0, False),
])  # fmt: skip
def test_ties_may_round_either_way(differ, integers, steps, beyond):
    assert Deviation(differ / integers, integers, steps).beyond() is beyond
