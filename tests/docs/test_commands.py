"""Every command and link in README and docs exists; the cheap commands run."""

import importlib.util
import re
import shlex
import subprocess
import sys

import pytest

from benchmarks.tables.experiments import table_names
from calib.weights.zoo import resolve_model
from deploy.cli import VERBS
from deploy.recipe import load_recipe, recipe_from_tables, recipe_names
from tests.docs.pages import PAGES, ROOT, commands

MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
VARIABLES = set(re.findall(r"^([A-Z_]+) \?=", MAKEFILE, re.MULTILINE))
COMMANDS = sorted({command for page in PAGES for command in commands(page.read_text())})
METHODS = (ROOT / "docs/methods.md").read_text()
EXAMPLES = {"mine.toml", "path/to/mine.toml", "RECIPE"}  # recipes that a reader writes
CHEAP = ("python -m deploy list", "python -m deploy recipe int8", "make help")


def anchors(page):
    """The anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("command", [one for one in COMMANDS if one.startswith("make ")])
def test_a_make_command_names_what_exists(command):
    target, *given = shlex.split(command)[1:]
    assert target in TARGETS
    for assignment in given:
        name, _, value = assignment.partition("=")
        assert name in VARIABLES, f"{name} is no variable of the Makefile"
        if name == "MODEL":
            resolve_model(value)
        if name == "RECIPE" and value not in EXAMPLES:
            load_recipe(value)
        if name == "PAPER":
            assert value in table_names()


@pytest.mark.parametrize("command", [one for one in COMMANDS if one.startswith("python ")])
def test_a_python_command_names_what_exists(command):
    module, *given = command.split()[2:]
    assert importlib.util.find_spec(module)
    if module == "deploy" and given:
        assert given[0] in VERBS


@pytest.mark.parametrize("command", CHEAP)
def test_a_cheap_command_runs(command):
    words = command.replace("python", sys.executable, 1).split()
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_make_help_lists_every_target():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in TARGETS:
        assert re.search(rf"^{target}\b", shown, re.MULTILINE), target


def test_ci_runs_the_documented_test_command():
    assert "make test" in COMMANDS
    assert "make test" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    named = re.findall(r"`((?:[\w-]+/)+[\w.-]*)`", page.read_text())
    known = ("val/", "train/", "calib/")  # folders of ImageNet
    missing = [name for name in named if name not in known and not (ROOT / name).exists()]
    assert missing == []


def test_every_recipe_has_a_heading_and_a_command():
    headings = " ".join(re.findall(r"^## (.*)$", METHODS, re.MULTILINE))
    for name in recipe_names():
        assert re.search(rf"\b{name}\b", headings), name
        assert re.search(rf"make engine .*RECIPE={name}$", METHODS, re.MULTILINE), name


def test_every_method_has_a_heading():
    headings = re.findall(r"^## (\w+)", METHODS, re.MULTILINE)
    for path in (ROOT / "calib/methods").glob("[a-z]*.py"):
        assert path.stem in headings or path.stem in ("rtn", "erq"), path.stem  # those two are recipes: int8, int8_erq


def test_the_recipes_in_the_text_are_read():
    import tomllib

    blocks = re.findall(r"```toml\n(.*?)```", METHODS, re.DOTALL)
    assert blocks
    for block in blocks:
        assert recipe_from_tables("mine", tomllib.loads(block), "docs/methods.md").method != "rtn"


def test_every_heading_of_a_method_says_what_costs_when():
    for section in METHODS.split("\n## ")[1:]:
        for part in (r"\*\*What (it does|they do)\.\*\*", r"\*\*What (it costs|they cost)\.\*\*", r"\*\*When to use"):
            assert re.search(part, section), section.splitlines()[0]
        assert "```sh" in section, section.splitlines()[0]
