"""What a stage decided, kept and replayed. Oracle: the stage itself, bit for bit."""

import dataclasses
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from calib.grids import Unrounded
from calib.network.qdq import quantized_net
from calib.network.rounded_layer import rounded_layer, with_layers
from calib.quant_model import QuantModel, StageRecord
from calib.quantizer import QParams
from calib.store.checkpoint import read_state, write_state
from calib.store.provenance import made_by
from compensation.branch import ConvBranch, DenseBranch, SharedBranch
from compensation.moments import Fit
from deploy import kept_states
from deploy.kept_states import CLASSES, KeptStates
from deploy.recipe import recipe_from_tables
from deploy.stages import CalibrationImages, stages
from tests.tiny import TINY, tiny_batches, tiny_halves, tiny_model

PLAIN = {"equalise": {"exponents": [0.5, 0.7]}, "calibrate": {"observer": "max"}}
MAX = {"calibrate": {"observer": "max"}}
# What the stages can decide, together: moves, shifts, every kind of grid, weights, biases and branches.
RECIPES = {
    **{f"{family}, plain": (family, PLAIN) for family in sorted(TINY)},
    "vit, all": ("vit", {
        **PLAIN, "precision": {"weights": 3}, "attention": {"int8": "all"}, "method": {"name": "gptq"},
        "compensate": {"forms": ["dense"], "min_r2_per_kernel": 0.0}, "finetune": {},
    }),
    "vit, attention dropped": ("vit", {**MAX, "attention": {"max_loss_db": -1.0}}),
    "vit, branches that read integers": ("vit", {**MAX, "compensate": {"forms": ["shared", "shared_mlp"]}}),
    "resnet, branches": ("resnet", {**MAX, "precision": {"weights": 3}, "compensate": {"min_r2_per_kernel": 0.0}}),
    "vit, RepQ-ViT": ("vit", {
        "precision": {"weights": 4, "inputs": 4, "zero_points": True, "attention": "log_sqrt2"},
        "equalise": {"rule": "repq"}, "calibrate": {"observer": "repq"},
    }),
    "vit, twin grids": ("vit", {
        "precision": {"weights": 6, "inputs": 6, "attention": "twin", "gelu": "twin"}, "calibrate": {"observer": "search"},
    }),
    "vit, weights alone": ("vit", {"precision": {"weights": 4, "inputs": 32}, **MAX}),
    "vit, weights in groups": ("vit", {"precision": {"weights": 4, "inputs": 32, "weight_group": 8}, **MAX}),
}  # fmt: skip


def images():
    halves = tiny_halves(4)
    return CalibrationImages(next(iter(halves[0]))[:1], halves)


def made(name="vit, plain"):
    """The stages of a recipe, with the model after each; the first is fold."""
    family, tables = RECIPES[name]
    recipe = recipe_from_tables("r", tables, "r")
    model, found = replace(tiny_model(family), precision=recipe.precision), []
    for stage in stages(recipe):
        model = stage.run(model, images())
        found.append((stage, model))
    return found


def assert_same(one, other, where):
    """Both hold the same values, bit for bit."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
        assert one.requires_grad == other.requires_grad, where
    elif isinstance(one, nn.Module):
        assert_same(dict(one.state_dict(keep_vars=True)), dict(other.state_dict(keep_vars=True)), where)
        assert [type(module) for module in one.modules()] == [type(module) for module in other.modules()], where
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key, value in one.items():
            assert_same(value, other[key], f"{where}.{key}")
    elif isinstance(one, tuple | list):
        assert len(one) == len(other), where
        for index, (mine, others) in enumerate(zip(one, other, strict=True)):
            assert_same(mine, others, f"{where}.{index}")
    elif dataclasses.is_dataclass(one):
        for field in dataclasses.fields(one):
            assert_same(getattr(one, field.name), getattr(other, field.name), f"{where}.{field.name}")
    elif type(one) is Unrounded:
        assert vars(one) == vars(other) == {}, where
    else:
        assert one == other, where


def without_notes(model):
    return replace(model, history=tuple(replace(each, notes=()) for each in model.history))


@pytest.mark.parametrize("name", RECIPES)
def test_every_stage_replays_bit_for_bit(tmp_path, name):
    (_, model), *rest = made(name)
    kept, key = KeptStates(tmp_path), "first"
    before = replayed = model
    for stage, after in rest:
        key = kept.key(key, stage.name, stage.options)
        assert kept.save(before, after, stage.name, key) == ""
        found, why = kept.load(replayed, stage.name, key)
        assert why == ""
        assert_same(without_notes(after), without_notes(found), stage.name)
        assert (found.exact_net is found.net) == (after.exact_net is after.net)
        assert (found.net is replayed.net) == (after.net is before.net)
        x = tiny_batches(1, seed=3)[0]
        with torch.inference_mode():
            assert torch.equal(quantized_net(after)(x), quantized_net(found)(x)), stage.name
        before, replayed = after, found


@pytest.mark.slow
def test_together_these_recipes_decide_all_that_can_be_kept():
    kinds, changed = set(), set()
    for name in RECIPES:
        (_, before), *rest = made(name)
        for stage, after in rest:
            if after.net is not before.net:
                changed.add(stage.name)
            before = after
        values = [*after.quantizers.values(), *after.branches.values(), *after.moved, *after.history, after.precision]
        kinds |= {type(value) for value in values}
    assert kinds == {*CLASSES}
    assert changed == {"equalise", "gptq", "attention"}, "stages that change the network's numbers"


FIT = Fit(torch.randn(8, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64))
BRANCHES = (
    DenseBranch(FIT), SharedBranch(FIT, "mlp.fc1", QParams(torch.tensor(0.5))), ConvBranch([FIT, FIT], 2)
)  # fmt: skip


@pytest.mark.parametrize("branch", BRANCHES, ids=lambda branch: type(branch).__name__)
def test_branches_of_every_form_come_back(kept, two, branch):
    after = replace(two[0], branches={"blocks.0": branch})
    kept.save(two[0], after, "s", "k")
    found, _ = kept.load(two[0], "s", "k")
    assert_same(found.branches, after.branches, "branches")
    names = ("reader", "groups", "stride", "training")
    assert [getattr(found.branches["blocks.0"], name, None) for name in names] == [
        getattr(branch, name, None) for name in names
    ]


@pytest.fixture(scope="module")
def two():
    """(the equalised model, the calibrated one)."""
    return tuple(model for _, model in made()[1:3])


@pytest.fixture
def kept(tmp_path):
    return KeptStates(tmp_path / "stages")


@pytest.fixture
def saved(kept, two):
    assert kept.save(*two, "calibrate", "k" * 64) == ""
    return kept


def only_file(kept):
    (path,) = kept.folder.iterdir()
    return path


def test_the_history_says_where_it_comes_from(saved, two):
    found, _ = saved.load(two[0], "calibrate", "k" * 64)
    *earlier, last = found.history
    assert tuple(earlier) == two[0].history
    assert last.notes == (*two[1].history[-1].notes, "taken from cache kkkkkkkkkkkk")
    assert json.dumps(last.details) == json.dumps(two[1].history[-1].details)
    assert last.seconds == two[1].history[-1].seconds


def test_weights_on_their_grid_are_kept_as_integers(kept, two):
    _, calibrated = two
    layers = {name: rounded_layer(calibrated.net.get_submodule(name)) for name in calibrated.layers}
    rounded = with_layers(calibrated, layers).with_record(StageRecord("s", {}))
    kept.save(calibrated, rounded, "s", "k")
    state = read_state(only_file(kept), CLASSES)
    weights = [value for name, value in state["net"].items() if name.endswith(".weight")]
    assert len(weights) == len(layers)
    assert {value.dtype for value in weights} == {torch.int8}
    assert_same(kept.load(calibrated, "s", "k")[0].net, rounded.net, "net")


@dataclasses.dataclass(frozen=True)
class Wider(QuantModel):
    """A model with fields of a later day."""

    costs: dict[str, float] = dataclasses.field(default_factory=dict)
    grids: dict[str, QParams] = dataclasses.field(default_factory=dict)


def test_fields_that_are_added_later_are_kept_too(kept, two):
    values = {field.name: getattr(two[0], field.name) for field in dataclasses.fields(two[0])}
    before = Wider(**values)
    after = replace(before, costs={"a": 1.5}, grids={"b": QParams(torch.ones(()))})
    kept.save(before, after, "stage", "k")
    found, _ = kept.load(before, "stage", "k")
    assert found.costs == after.costs
    assert torch.equal(found.grids["b"].scale, torch.ones(()))


INPUTS = {"network": "ab", "images": ["cd", "ef"], "batch": 4, "seed": 0}


def keys(kept, inputs=INPUTS, tables=PLAIN):
    """Stage -> key of its state."""
    recipe, key, found = recipe_from_tables("r", tables, "r"), kept.first_key(inputs), {}
    for stage in stages(recipe):
        found[stage.name] = key = kept.key(key, stage.name, stage.options)
    return found


@pytest.mark.parametrize("change", [
    {"network": "ac"}, {"images": ["cd", "ee"]}, {"images": ["ef", "cd"]}, {"batch": 5}, {"seed": 1}, {"more": 0}
], ids=str)  # fmt: skip
def test_other_inputs_have_other_states(kept, change):
    assert not {*keys(kept).values()} & {*keys(kept, {**INPUTS, **change}).values()}


def test_an_option_decides_its_stage_and_what_follows_alone(kept):
    first, other = keys(kept), keys(kept, tables={**PLAIN, "calibrate": {"observer": "mse"}})
    assert [stage for stage in first if first[stage] == other[stage]] == ["fold", "equalise"]
    assert len({*first.values()}) == len(first)
    assert keys(kept) == first


@pytest.mark.parametrize("part", made_by())
def test_other_code_libraries_or_processor_have_other_states(tmp_path, monkeypatch, part):
    first = keys(KeptStates(tmp_path))
    monkeypatch.setattr(kept_states, "made_by", lambda *code: {**made_by(*code), part: "other"})
    assert not {*first.values()} & {*keys(KeptStates(tmp_path)).values()}


def test_the_code_is_that_of_the_stages_and_of_the_file():
    assert [path.name for path in kept_states.CODE] == [
        "compensation", "stages.py", "acceptance.py", "measure", "kept_states.py",
    ]  # fmt: skip
    assert all(path.exists() for path in kept_states.CODE)


def flipped(content: bytes, where: int) -> bytes:
    return content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :]


DAMAGE = {
    "empty": lambda _: b"",
    "truncated": lambda whole: whole[:-1],
    "cut in half": lambda whole: whole[: len(whole) // 2],
    "garbage": lambda _: os.urandom(1000),
    "a flipped bit in the digest": lambda whole: flipped(whole, 3),
    "a flipped bit in a name": lambda whole: flipped(whole, whole.index(b"blocks.1.mlp.fc1:input")),
    "a flipped bit in the middle": lambda whole: flipped(whole, len(whole) // 2),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_not_used_and_written_again(saved, two, damage):
    path = only_file(saved)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    assert saved.load(two[0], "calibrate", "k" * 64) == (None, f"{path} is damaged: not used")
    saved.save(*two, "calibrate", "k" * 64)
    assert saved.load(two[0], "calibrate", "k" * 64)[0] is not None


def test_a_file_under_anothers_name_is_refused(saved, two):
    path = saved.path("calibrate", "l" * 64)
    only_file(saved).rename(path)
    assert saved.load(two[0], "calibrate", "l" * 64) == (
        None, f"{path} is made from other inputs than its name says: not used"
    )  # fmt: skip


class Trap:
    """What an attacker keeps: reading it would make a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_code_in_a_file_never_runs(saved, two, tmp_path):
    path = only_file(saved)
    state = read_state(path, CLASSES)
    write_state(path, {**state, "net": Trap(tmp_path / "trapped")})
    found, why = saved.load(two[0], "calibrate", "k" * 64)
    assert found is None
    assert why.startswith(f"{path} is no state of this tool (")
    assert why.endswith(": not used")
    assert not (tmp_path / "trapped").exists()


def test_a_place_that_cannot_be_written_is_no_error_and_is_told_once(tmp_path, two):
    (tmp_path / "file").write_text("")
    kept = KeptStates(tmp_path / "file" / "stages")
    assert kept.load(two[0], "calibrate", "k") == (None, "")
    assert kept.save(*two, "calibrate", "k") == f"not kept: {kept.folder} cannot be written (Not a directory)"
    assert kept.save(*two, "calibrate", "k") == ""


def test_switched_off_it_neither_reads_nor_writes(saved, two):
    path = only_file(saved)
    before = path.stat().st_mtime_ns
    off = KeptStates(None)
    assert off.load(two[0], "calibrate", "k" * 64) == (None, "")
    assert off.save(*two, "calibrate", "k" * 64) == ""
    assert path.stat().st_mtime_ns == before


def test_nothing_but_the_file_is_left_behind_and_its_name_tells_the_stage(kept, two):
    kept.save(*two, "simulated attention", "k" * 64)
    assert [path.name for path in kept.folder.iterdir()] == [f"simulated_attention.{'k' * 64}.pt"]


def test_beyond_the_limit_what_was_used_longest_ago_goes(kept, two, monkeypatch):
    for age, key in enumerate("abc"):
        kept.save(*two, "calibrate", key)
        os.utime(kept.path("calibrate", key), (100 - age, 100 - age))  # c is the oldest
    assert kept.load(two[0], "calibrate", "c")[0] is not None  # and is used now
    size = kept.path("calibrate", "a").stat().st_size
    monkeypatch.setattr(kept_states, "MOST_BYTES", 3 * size + size // 2)
    kept.save(*two, "calibrate", "d")
    assert {key for key in "abcd" if kept.path("calibrate", key).exists()} == {"a", "c", "d"}


def test_what_decisions_do_not_describe_is_not_kept_and_said(kept, two):
    before, after = two
    net = nn.Sequential(nn.Identity())
    assert kept.save(before, replace(after, net=net), "s", "k") == "not kept: it changed modules of the network"
    assert before.moved
    assert (
        kept.save(before, replace(after, moved=before.moved[1:]), "s", "k") == "not kept: it took back channel scales"
    )
    assert not kept.folder.exists()


def test_a_stage_that_only_tells_something_keeps_the_network_itself(kept, two):
    kept.save(two[0], two[0].with_record(StageRecord("s", {})), "s", "k")
    found, _ = kept.load(two[0], "s", "k")
    assert found.net is two[0].net
    assert found.exact_net is two[0].exact_net
