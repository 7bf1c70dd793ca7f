"""The papers' tables as data: what was published parses and is plausible, and what is wrong is named."""

import itertools

import pytest

from benchmarks.tables.experiments import FLOAT_BITS, load_table, table_names
from calib.errors import UserError
from calib.weights.zoo import ZOO

OWN = "qwt_forms"  # no published rows: INT8 as engines run it
# (table, bits, method, model, top-1) read from the papers, one or two per file.
PRINTED = [
    ("qwt", "4/4", "RepQ-ViT + QwT", "vit_b", 76.3),
    ("qwt", "6/6", "Percentile + QwT*", "resnet101", 77.2),
    ("erq", "3/4", "ERQ", "swin_b", 75.78),
    ("erq", "4/4", "GPTQ", "deit_s", 70.85),
    ("adaq", "2/2", "AdaQTransform on NWQ", "mobilenetv2", 32.19),
    ("adaq", "4/32", "AdaQTransform on RepQ-ViT", "deit_b", 81.10),
    ("adaq_cases", "3/2", "case 2.2", "mobilenetv2", 42.60),
]


@pytest.mark.parametrize("name", table_names())
def test_a_table_parses_and_rounding_never_beats_float(name):
    table = load_table(name)
    assert set(table.models) <= set(ZOO)
    full, *rest = table.published
    assert full.bits == FLOAT_BITS
    assert set(full.top1) == set(table.models)
    assert rest or name == OWN
    for row in rest:
        for model, top1 in row.top1.items():
            assert top1 <= full.top1[model] + 0.2, f"{row.method} at {row.bits}, {model}"
    first_last = 0 if name == OWN else 8
    assert all(each.recipe.precision.first_last == first_last for each in table.experiments)


# (table, network, bits, method, numbers) read from the papers, of networks that are not run.
PRINTED_ONLY = [
    ("qwt", "DETR ResNet-50", "8/8", "MinMax + QwT", (58.4, 41.7)),
    ("qwt", "CLIP ViT-B/32, both towers", "8/8", "RepQ-ViT + QwT", (252.6, 54.6)),
    ("qwt", "DiT-XL/2, 50 steps, cfg 1.5", "8/8", "Q-DiT + QwT", (707, 5.35, 236.91)),
    ("qwt", "DiT-XL/2, 100 steps, cfg 1.5", "4/8", "Q-DiT + QwT", (5.86, 18.29, 221.66, 0.7678, 0.6915)),
    ("qwt", "LLaMA3-8B", "4/16", "GPTQ + QwT", (6.80, 6.63, 9.38, 65.18)),
    ("erq", "Cascade R-CNN Swin-T", "4/4", "ERQ", (47.9, 42.1)),
    ("erq", "Mask R-CNN Swin-S", "4/8", "ERQ", (46.1, 42.2)),
    ("adaq", "RetinaNet MobileNet-v2", "2/2", "AdaQTransform on NWQ", (18.10,)),
    ("adaq", "OPT-6.7B", "8/8", "naive", (41.9,)),
    ("adaq", "EDSR x4", "4/4", "AdaQTransform", (31.41, 0.845, 27.55, 0.742, 26.81, 0.698, 24.64, 0.718)),
]


@pytest.mark.parametrize(("name", "network", "bits", "method", "numbers"), PRINTED_ONLY)
def test_published_rows_of_networks_that_are_not_run_are_known(name, network, bits, method, numbers):
    (found,) = (group for group in load_table(name).not_run if group.network == network)
    assert [row for row in found.rows if row[:2] == (bits, method)] == [(bits, method, numbers)]
    assert found.rows[0][1] == "float"
    assert found.why.startswith("needs ")


def test_all_tables_of_the_three_papers_are_known():
    found = {name: {group.where.partition(";")[0] for group in load_table(name).not_run} for name in table_names()}
    assert found["qwt"] == {f"table {number}" for number in (5, 6, 7, 8)} | {"appendix, table 4", "appendix, table 5"}
    assert found["erq"] == {"tables 3 and 12"}
    assert found["adaq"] == {"table 5", "table 6", "table 7"}


@pytest.mark.parametrize("name", table_names())
def test_rows_have_the_bits_they_name_and_no_name_twice(name):
    table = load_table(name)
    for each in table.experiments:
        assert f"{each.recipe.precision.weights}/{each.recipe.precision.inputs}" == each.bits
    names = [(each.bits, each.method) for each in table.experiments]
    assert len(set(names)) == len(names)
    bits = [each.bits for each in table.experiments]
    assert [first for first, _ in itertools.groupby(bits)] == list(dict.fromkeys(bits)), (
        "rows of the same bits are apart"
    )


@pytest.mark.parametrize(("name", "bits", "method", "model", "top1"), PRINTED)
def test_published_numbers_stand_under_their_model(name, bits, method, model, top1):
    (row,) = (row for row in load_table(name).published if (row.bits, row.method) == (bits, method))
    assert row.top1[model] == top1


def test_a_table_of_our_own_holds_recipes_that_engines_run():
    assert all(each.recipe.for_engine() == each.recipe for each in load_table(OWN).experiments)


def test_the_papers_rows_run_in_the_simulation_alone():
    for name in {*table_names()} - {OWN}:
        for each in load_table(name).experiments:
            with pytest.raises(UserError, match="simulated only"):
                each.recipe.for_engine()


GOOD = 'title = "t"\nmodels = ["vit_s"]\nfloat = [80.0]\n'
OURS = '[ours]\na = {bits = ["4/4"]}\n'
BAD = {
    "unknown key": (GOOD + "titel = 1\n" + OURS, r"unknown key 'titel'.*Did you mean 'title'"),
    "no rows": (GOOD, "has no 'ours'"),
    "a number too many": (GOOD + '[published."4/4"]\nx = [1.0, 2.0]\n' + OURS, r"'x' at 4/4 has 2 numbers; expected 1"),
    "no percentage": (GOOD + '[published."4/4"]\nx = ["?"]\n' + OURS, r"'x' at 4/4 has '\?'; expected %"),
    "bits": (GOOD + '[ours]\na = {bits = ["four"]}\n', "bits 'four' are not of the form weights/inputs"),
    "too many bits": (GOOD + '[ours]\na = {bits = ["9/4"]}\n', "weights 9 is not one of 2, 3"),
    "no bits": (GOOD + "[ours]\na = {calibrate = {}}\n", r"expected the tables of a recipe and bits"),
    "option": (GOOD + '[ours]\na = {bits = ["4/4"], calibrate = {observe = "max"}}\n', "Did you mean 'observer'"),
    "method": (GOOD + '[ours]\na = {bits = ["4/4"], method = {name = "gptk"}}\n', "Did you mean 'gptq'"),
    "not TOML": ("[ours", "cannot be read"),
    "no reason": (
        GOOD + '[[not_run]]\nnetwork = "n"\n' + OURS,
        r"a \[\[not_run\]\] has network; expected network, where",
    ),
    "a figure too few": (
        GOOD + '[[not_run]]\nnetwork = "n"\nwhere = "t"\nfigures = ["AP"]\nwhy = "w"\nrows = [["4/4", "m"]]\n' + OURS,
        r"n, 'm' at 4/4 has \[\]; expected 1 numbers or '-': AP",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_table_is_refused_with_a_suggestion(tmp_path, case):
    text, expected = BAD[case]
    (tmp_path / "t.toml").write_text(text)
    with pytest.raises(UserError, match=expected) as caught:
        load_table(str(tmp_path / "t.toml"))
    assert "\n" not in str(caught.value)


def test_a_wrong_name_is_refused_with_the_nearest():
    with pytest.raises(
        UserError, match=r"unknown PAPER 'ercq': expected adaq, adaq_cases, erq, qwt.*Did you mean 'erq'"
    ):
        load_table("ercq")
