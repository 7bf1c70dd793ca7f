"""What a JSON file holds is taken as it is, and what it lacks is one line. Oracle: the content typed here."""

import json

import pytest

from calib.errors import UserError
from deploy.pages.values import LONGEST, Figure, Values

CONTENT = {
    "a/b": {"c~d": [1.5, {"e": 2000000}]}, "text": "one\n two", "long": "x" * 900, "flag": True, "none": None,
    "turned": "a\x1b\ud800\u202eb",
    "nan": float("nan"), "huge": 10**400, "far": 1e300, "names": ["p", "q"], "why": {"layer": "reason"},
}  # fmt: skip


@pytest.fixture
def values(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(CONTENT))
    return Values.of(path)


def test_a_figure_names_its_place_by_a_json_pointer(values):
    figure = values.part("a/b").figure("c~d", 1, "e", spec=".1f", scale=1e-6, unit=" MB")
    assert figure == Figure("2.0 MB", 2000000, "report.json#/a~1b/c~0d/1/e")
    assert str(figure) == "2.0 MB"


def test_texts_are_one_line_of_bounded_length(values):
    assert values.text("text") == "one two"
    assert len(values.text("long")) < LONGEST + 10
    assert values.text("turned") == "a\ufffd\ufffd\ufffdb"
    assert values.texts("names") == ("p", "q")
    assert values.reasons("why") == {"layer": "reason"}
    assert [name for name, _ in values.parts("a/b")] == ["c~d"]


def test_null_and_what_is_not_there_are_not_held(values):
    assert values.holds("a/b", "c~d", 0)
    assert not any(values.holds(*keys) for keys in (("none",), ("other",), ("a/b", "c~d", 2), ("text", "x")))


@pytest.mark.parametrize(
    ("ask", "keys", "message"),
    [
        ("number", ("text",), "holds no number at 'text'"),
        ("number", ("flag",), "holds no number at 'flag'"),
        ("number", ("nan",), "holds no number of a size that can be shown at 'nan'"),
        ("number", ("huge",), "holds no number of a size that can be shown at 'huge'"),
        ("number", ("far",), "holds no number of a size that can be shown at 'far'"),
        ("number", ("a/b", "c~d", 9), r"holds no number at 'a/b\.c~d\.9'"),
        ("text", ("none",), "holds no text at 'none'"),
        ("texts", ("why",), "holds no list at 'why'"),
        ("texts", ("a/b", "c~d"), "holds no text at"),
        ("flag", ("text",), "holds no true or false at 'text'"),
        ("part", ("text",), "holds no list or object at 'text'"),
        ("names", ("names",), "holds no object at 'names'"),
        ("reasons", ("a/b",), "holds no text at"),
    ],
)
def test_something_else_is_refused_in_one_line(values, ask, keys, message):
    with pytest.raises(UserError, match=message) as refused:
        getattr(values, ask)(*keys)
    assert "\n" not in str(refused.value)
    assert str(refused.value).endswith("build the package again")
