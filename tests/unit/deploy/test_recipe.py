import pytest

from calib.errors import UserError
from deploy.recipe import load_recipe, recipe_names

BAD = {
    "unknown table": ('[calibrat]\nobserver = "max"', r"unknown key 'calibrat'.*Did you mean 'calibrate'"),
    "unknown option": ('[calibrate]\nobserve = "max"', r"unknown option 'observe'.*Did you mean 'observer'"),
    "wrong type": ("[calibrate]\nobserver = 3", r"option 'observer' is 3; expected str"),
    "wrong value": ('[calibrate]\nobserver = "maxx"', r"'maxx' is not one of search, max"),
    "unknown method": ('[method]\nname = "rtm"', r"unknown method 'rtm'.*Did you mean 'rtn'"),
    "option the method lacks": (
        '[method]\nname = "rtn"\nsteps = 3',
        r"unknown option 'steps'; expected bias_correction",
    ),
    "not a table": ("calibrate = 3", "expected a table"),
    "not TOML": ("[calibrate", "cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_recipe_is_refused_with_a_suggestion(tmp_path, case):
    text, expected = BAD[case]
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(UserError, match=expected) as caught:
        load_recipe(str(tmp_path / "r.toml"))
    assert "r.toml" in str(caught.value) or "method" in case
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_resolves_and_says_what_it_is(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description


def test_whole_numbers_are_accepted_where_a_float_is_meant(tmp_path):
    (tmp_path / "r.toml").write_text("[calibrate]\npercentile = 99")
    assert load_recipe(str(tmp_path / "r.toml")).calibrate.percentile == 99
