"""Charts hold the names and figures they are given, whatever these are. Oracle: the SVG as an XML parser reads it."""

import base64
import xml.etree.ElementTree as ElementTree

import pytest

from deploy.pages.charts import bars_chart, errors_chart, pairs_chart, steps_chart

NAMES = ("$\\frac{x$", "<script>&", "a'b\"c", "日本語")


def texts(uri):
    """The texts of a chart, in order."""
    svg = base64.b64decode(uri.removeprefix("data:image/svg+xml;base64,"))
    return ["".join(each.itertext()) for each in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def charts_of(name, number):
    yield bars_chart([(name, number)], "dB", ".2f")
    yield pairs_chart({name: [number, 1.0]}, ("one", "other"), "MB")
    yield steps_chart([(name, None, number), ("b", number, 1.0)], (1.0, number, 2.0))
    yield errors_chart([(name, abs(number) or 1.0, None), ("b", 1.0, 0.5)])


@pytest.mark.filterwarnings("ignore:Glyph")  # the font of the reader draws it, not the one here
@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_text_and_nothing_else(name):
    for uri in charts_of(name, 2.0):
        assert name in texts(uri)


def test_a_long_name_keeps_its_end():
    (shown,) = [text for text in texts(bars_chart([("x" * 50 + ".mlp.fc1", 1.0)], "dB", ".2f")) if "mlp" in text]
    assert shown.endswith("x.mlp.fc1")
    assert len(shown) == 30


def test_the_figures_stand_at_their_bars():
    assert {"1.25", "-0.50"} <= {*texts(bars_chart([("a", 1.25), ("b", -0.5)], "dB", ".2f"))}
    assert {"20.0", "+1.50", "-2.00", "23.0"} <= {
        *texts(steps_chart([("r", None, 20.0), ("s", 20.0, 21.5), ("t", 22.0, 20.0)], (23.0, 22.0, 24.0)))
    }


@pytest.mark.parametrize("number", [0.0, -1.0, 1e18, -1e18, 1e-300])
def test_any_number_that_is_let_in_can_be_drawn(number):
    for uri in charts_of("a", number):
        assert texts(uri)
