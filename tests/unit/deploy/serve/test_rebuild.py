"""What of a package stays when its engine is built again. Oracle: values typed here."""

import pytest

from deploy.serve.rebuild import BUILT_AGAIN, _kept_limits, _warnings

DB = {"limit": "MAX_DROP=30dB", "kept": True, "measured": "31 dB"}
SPEED = {"limit": "MIN_SPEEDUP=1.5", "kept": False, "measured": "1.2x"}


@pytest.mark.parametrize(
    ("checks", "accepted", "left"),
    [([DB, SPEED], True, [DB]), ([{**DB, "kept": False}, SPEED], False, [{**DB, "kept": False}]), ([SPEED], True, [])],
)
def test_the_speed_of_another_engine_is_no_limit_any_more(checks, accepted, left):
    assert _kept_limits({"accepted": False, "checks": checks}) == {"accepted": accepted, "checks": left}


def test_a_package_without_limits_has_none():
    assert _kept_limits(None) == {"accepted": True, "checks": []}


def test_what_the_older_engine_said_goes():
    said = ["random", "a note", f"{BUILT_AGAIN} tensorrt_rtx 1.7", "few images"]
    assert _warnings({"engine": {"notes": ["a note"]}, "warnings": said}) == ["random", "few images"]
    assert _warnings({"engine": {}, "warnings": ["a note", 3]}) == ["a note"]
    assert _warnings({"engine": {"notes": "no list"}}) == []
