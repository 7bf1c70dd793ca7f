"""The promise of every recipe: it runs to a verified package on a small network, and says what it did."""

import json

import pytest

from deploy import cli
from deploy.recipe import load_recipe, recipe_names

pytestmark = pytest.mark.slow

pytest.importorskip("tensorrt_rtx")

MODELS = {"vit": "test_vit", "cnn": "test_resnet"}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One cache for all recipes: many begin with the same stages, which are then replayed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def report_of(tmp_path, model, recipe, *options):
    command = ["engine", "--model", model, "--weights", "random", "--calib-images", "48", "--sm", "89"]
    assert cli.main([*command, "--recipe", recipe, "--out", str(tmp_path / "out"), *options]) == 0
    (path,) = tmp_path.rglob("report.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_gives_a_package_for_a_transformer(tmp_path, recipe):
    report = report_of(tmp_path, MODELS["vit"], recipe)
    stages = [record["stage"] for record in report["history"]]
    loaded = load_recipe(recipe)
    expected = {
        "equalise": loaded.equalise, "attention": loaded.attention, "keep_float": loaded.keep_float,
        "int8_shortcuts": loaded.int8_shortcuts, "int8_products": loaded.int8_products,
        "qwt": loaded.compensate, "qwt_star": loaded.finetune, loaded.method: True, "calibrate": True,
    }  # fmt: skip
    assert set(stages) == {"fold", *(stage for stage, wanted in expected.items() if wanted is not None)}
    assert report["engine"]["lost"] == report["engine"]["lost_attention"] == []
    assert report["engine"]["int8_attention"] == len(report["int8_attention"])
    assert [step["step"] for step in report["waterfall"][1:]] == [
        "bias correction" if record["stage"] == "rtn" else record["stage"]
        for record in report["history"]
        if record["sqnr_after_db"] is not None
    ]
    if loaded.compensate is None or recipe.startswith("int8_plain"):  # scales this plain leave branches much to gain
        assert bool(report["branches"]) == (loaded.compensate is not None)
    else:
        (record,) = (record for record in report["history"] if record["stage"] == "qwt")
        assert report["branches"] or record["sqnr_after_db"] == record["sqnr_before_db"]
    for figures in report["branches"].values():
        assert {"form", "r2", "r2_cv", "r2_official", "error_before", "error_after", "bytes"} <= figures.keys()


@pytest.mark.parametrize("recipe", ["int8_erq", "int8_plain_qwt"])
def test_repairs_run_on_a_cnn(tmp_path, recipe):
    report = report_of(tmp_path, MODELS["cnn"], recipe)
    assert report["engine"]["int8_convs"] == report["engine"]["planned"]


def test_no_extra_kernel_means_none(tmp_path):
    plain = load_recipe("int8_plain_qwt").calibrate
    recipe = tmp_path / "all_forms.toml"
    recipe.write_text(f'[calibrate]\nobserver = "{plain.observer}"\npercentile = {plain.percentile}\n[compensate]\n')
    report = report_of(tmp_path, MODELS["vit"], str(recipe), "--max-extra-kernels", "0")
    assert report["branches"]
    assert report["engine"]["kernels"] <= report["engine"]["kernels_without_branches"]
    (record,) = (record for record in report["history"] if record["stage"] == "qwt")
    assert record["config"]["max_extra_kernels"] == 0


def test_limits_without_branches_are_refused(capsys):
    assert cli.main(["engine", "--recipe", "int8", "--max-extra-kernels", "0"]) == 2
    assert "adds no branches to limit" in capsys.readouterr().err


def test_attention_on_a_network_without_any_is_refused(tmp_path, capsys):
    command = ["engine", "--model", MODELS["cnn"], "--weights", "random", "--calib-images", "16", "--sm", "89"]
    assert cli.main([*command, "--recipe", "int8_attention", "--out", str(tmp_path)]) == 2
    assert "ResNet has none" in capsys.readouterr().err
