import pytest

from deploy.engine.shape_text import dimensions, shape

HEADER = 'header {\n  outputs={ "y" }\n  shape_inputs={ "x_shapeInput.1" }\n}'
INPUT = '  copy={ name="c" output={"n" } input={"x_shapeInput.1" } stream=0 }\n'


def constant(value):
    return f'  memset={{ name="s" output={{"s" }}  src="{value}i64" stream=0 }}\n'


def step(operation, *inputs):
    listed = " ".join(f'"{name}"' for name in inputs)
    return f'  {operation}={{ name="p" output={{"out" }} input={{{listed} }} stream=0 layers="" }}\n'


@pytest.mark.parametrize(
    ("operation", "by", "expected"),
    [("mul", 49, 245), ("add", 49, 54), ("sub", 49, -44), ("div", 2, 2), ("div", -2, -2), ("min", 3, 3), ("max", 3, 5)],
)
def test_arithmetic(operation, by, expected):
    assert dimensions(HEADER, INPUT + constant(by) + step(operation, "n", "s"), 5)["out"] == expected


def test_what_cannot_be_computed_is_left_out():
    text = INPUT + step("eq", "n", "n") + step("mul", "n", "nowhere")
    assert dimensions(HEADER, text, 5) == {"x_shapeInput.1": 5, "n": 5}


def test_shapes():
    assert shape(["n", "49", "1"], {"n": 64}) == (64, 49, 1)
    assert shape([], {}) == ()
    assert shape(["n", "49"], {}) is None
