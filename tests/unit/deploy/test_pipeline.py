"""The spine says what its stages do. Oracle: their source, read with ast."""

import ast
import inspect
from functools import partial
from pathlib import Path

import pytest

from deploy import kept_states, pipeline, stages, steps
from deploy.pipeline import spine, stage_names
from deploy.plan import require_order
from deploy.recipe import load_recipe, recipe_from_tables, recipe_names
from deploy.report import evidence, manifest
from deploy.run import GIVEN

STAGES = ("equalise", "attention", "keep_float", "compensate", "finetune")
EVERYTHING = recipe_from_tables("", {key: {} for key in STAGES}, "")
MODULES = (steps, evidence, manifest)


def used(function):
    """(fields of `run` read before they are written here, fields written) in a function and those it hands `run` to."""
    reads, writes = set(), set()
    for node in ast.walk(ast.parse(inspect.getsource(function))):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "run":
            if not isinstance(node.ctx, ast.Del):  # what no later stage reads may go
                (reads if isinstance(node.ctx, ast.Load) else writes).add(node.attr)
        elif isinstance(node, ast.Call) and any(getattr(argument, "id", "") == "run" for argument in node.args):
            name = getattr(node.func, "id", "")
            for module in MODULES:
                if hasattr(module, name):
                    inner_reads, inner_writes = used(getattr(module, name))
                    reads, writes = reads | inner_reads, writes | inner_writes
    return reads, writes


@pytest.mark.parametrize("stage", spine(EVERYTHING), ids=lambda stage: stage.name)
def test_a_stage_reads_and_writes_what_the_spine_says(stage):
    function = stage.run.func if isinstance(stage.run, partial) else stage.run
    reads, writes = used(function)
    assert writes == {*stage.writes}
    assert reads - {*stage.writes} - {*GIVEN} <= {*stage.reads}
    assert {*stage.reads} <= reads


@pytest.mark.parametrize("name", recipe_names())
def test_what_a_stage_reads_was_written_before_it(name):
    require_order(spine(load_recipe(name)))


def test_the_spine_of_a_recipe_has_its_stages_in_order():
    assert [stage.name for stage in spine(EVERYTHING)] == [
        "load", "images", "fold", "equalise", "calibrate", "range", "rtn", "attention", "keep_float",
        "compensate", "finetune", "coverage", "export", "parity", "check", "build", "audit", "verify",
        "run", "benchmark", "accept", "package",
    ]  # fmt: skip
    limited = [stage.name for stage in spine(EVERYTHING, "MAX_DROP=1%")]
    assert limited[limited.index("keep_float") + 1] == "fall_back"
    assert limited[limited.index("fall_back") + 1] == "compensate"
    names = [stage.name for stage in spine(load_recipe("int8_erq"))]
    assert names[3:9] == ["equalise", "calibrate", "range", "erq", "keep_float", "coverage"]
    for recipe in map(load_recipe, recipe_names()):
        names = [stage.name for stage in spine(recipe)]
        assert len({*names}) == len(names), "a name stands for one stage"
        assert [each for each in names if each in {stage.name for stage in stages.stages(recipe)}] == [
            stage.name for stage in stages.stages(recipe)
        ]


def test_the_names_of_all_stages_tell_which_are_optional():
    assert stage_names() == {
        "torch": (
            "load", "images", "fold", "[equalise]", "calibrate", "range", "rtn", "[attention]",
            "[keep_float]", "[fall_back]", "[int8_shortcuts]", "[int8_products]", "[compensate]", "[finetune]", "coverage",
        ),
        "bridge": ("export", "parity"),
        "engine": ("check", "build", "audit", "verify", "run", "benchmark", "accept", "package"),
    }  # fmt: skip


def test_the_code_that_keys_states_has_all_that_decides_them():
    """A stage's code lies in calib/, compensation/ and deploy/stages.py, which name the states."""
    for path in kept_states.CODE:
        assert path.is_relative_to(Path(pipeline.__file__).parents[1])
    imported = {
        node.module
        for node in ast.walk(ast.parse(inspect.getsource(stages)))
        if isinstance(node, ast.ImportFrom) and node.module
    }
    assert {name for name in imported if name.startswith("deploy.")} == {"deploy.recipe"}
