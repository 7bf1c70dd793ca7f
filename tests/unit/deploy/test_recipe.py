import tomllib

import pytest

from calib.errors import UserError
from deploy.recipe import load_recipe, recipe_names

BAD = {
    "unknown table": ('[calibrat]\nobserver = "max"', r"unknown key 'calibrat'.*Did you mean 'calibrate'"),
    "unknown option": ('[calibrate]\nobserve = "max"', r"unknown option 'observe'.*Did you mean 'observer'"),
    "wrong type": ("[calibrate]\nobserver = 3", r"option 'observer' is 3; expected str"),
    "word for a list": ('[equalise]\nexponents = "abc"', r"option 'exponents' is 'abc'; expected a list of float"),
    "number for a list": ("[equalise]\nexponents = 0.5", r"option 'exponents' is 0.5; expected a list of float"),
    "word in a list": ('[compensate]\nridges = ["a"]', r"option 'ridges' is \['a'\]; expected a list of float"),
    "number in a list": ("[compensate]\nforms = [1]", r"option 'forms' is \[1\]; expected a list of str"),
    "list for a word": ('[calibrate]\nobserver = ["max"]', r"option 'observer' is \['max'\]; expected str"),
    "truth for a number": ("[compensate]\nrows = true", r"option 'rows' is True; expected int"),
    "truth for a float": ("[calibrate]\npercentile = true", r"option 'percentile' is True; expected float"),
    "truth in a list": ("[equalise]\nexponents = [true]", r"option 'exponents' is \[True\]; expected a list of float"),
    "float for a whole number": ("[compensate]\nrows = 1.5", r"option 'rows' is 1.5; expected int"),
    "no number": ("[calibrate]\npercentile = nan", r"option 'percentile' is nan; expected float"),
    "endless": ("[equalise]\nexponents = [inf]", r"option 'exponents' is \[inf\]; expected a list of float"),
    "method no table": ('method = "rtn"', r"\[method\]: expected a table of options, got 'rtn'"),
    "method no word": ("[method]\nname = 3", r"option '\[method\] name' is 3; expected str"),
    "description no word": ("description = 3", r"option 'description' is 3; expected str"),
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
    assert "r.toml" in str(caught.value) or case == "unknown method"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_resolves_and_says_what_it_is(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description


@pytest.mark.parametrize("name", ["..toml", "...toml", "a..toml", "a b.toml"])
def test_a_name_that_is_no_folder_name_is_refused(tmp_path, name):
    """A package lies in OUT/model/<name>: '.' would be the folder of all packages of the model."""
    (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=r"is named .*: expected letters"):
        load_recipe(str(tmp_path / name))


@pytest.mark.parametrize("name", ["v1.2-a_b", ".hidden", "é"])
def test_names_of_one_folder_are_accepted(tmp_path, name):
    (tmp_path / f"{name}.toml").write_text("")
    assert load_recipe(str(tmp_path / f"{name}.toml")).name == name


def test_a_list_becomes_a_tuple(tmp_path):
    (tmp_path / "r.toml").write_text("[equalise]\nexponents = [0, 0.5]")
    assert load_recipe(str(tmp_path / "r.toml")).equalise.exponents == (0, 0.5)


def test_whole_numbers_are_accepted_where_a_float_is_meant(tmp_path):
    (tmp_path / "r.toml").write_text("[calibrate]\npercentile = 99")
    assert load_recipe(str(tmp_path / "r.toml")).calibrate.percentile == 99


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_that_is_printed_and_read_again_is_the_same(name, tmp_path):
    recipe = load_recipe(name)
    path = tmp_path / f"{name}.toml"
    path.write_text(recipe.to_toml())
    assert load_recipe(str(path)) == recipe


def test_a_printed_recipe_has_options_that_the_file_leaves_out():
    options = tomllib.loads(load_recipe("int8_qwt").to_toml())
    assert options["compensate"]["ridges"] == [0.0, 0.003, 0.03, 0.3, 3.0]
    assert options["method"]["name"] == "rtn"
    assert "finetune" not in options
