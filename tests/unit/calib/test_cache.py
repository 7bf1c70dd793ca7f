import dataclasses
import json
import os

import pytest
import torch

from calib.cache import Cache
from calib.methods import rtn
from calib.network.fold import fold_affine
from calib.network.qdq import quantized_net
from calib.scales.calibrate import Config as CalibrateConfig
from calib.scales.calibrate import calibrate
from calib.scales.equalise import Config, equalise
from calib.store.provenance import code_sha256, made_by
from tests.tiny import TINY, tiny_batches, tiny_model

INPUTS = {"model": "tiny", "weights": "ab", "images": ["cd", "ef"], "batch": 4, "equalise": {"exponents": (0.5, 0.7)}}


def folded(family: str = "vit"):
    return fold_affine(tiny_model(family), tiny_batches(1)[0][:1])


def calibrated(model):
    folds = [tiny_batches(2, seed=1), tiny_batches(2, seed=2)]
    return calibrate(equalise(model, folds, Config((0.5, 0.7))), folds, CalibrateConfig("max"))


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(INPUTS, tmp_path / "calibration")


@pytest.fixture
def fresh(cache):
    fresh = calibrated(folded())
    assert cache.save(fresh) == f"kept in the cache as {cache.key[:12]}"
    return fresh


def only_file(cache):
    (path,) = cache.folder.iterdir()
    return path


@pytest.mark.parametrize("family", sorted(TINY))
def test_a_replay_is_bit_for_bit_the_fresh_run(cache, family):
    fresh = calibrated(folded(family))
    cache.save(fresh)
    found, said = cache.replayed(folded(family))
    assert said == f"equalise and calibrate taken from cache {cache.key[:12]}"
    assert fresh.moved
    for name, value in fresh.net.state_dict().items():
        assert torch.equal(value, found.net.state_dict()[name]), name
    assert list(found.quantizers) == list(fresh.quantizers)
    for quantizer, params in fresh.quantizers.items():
        assert torch.equal(params.scale, found.quantizers[quantizer].scale)
        assert (params.axis, params.narrow) == (found.quantizers[quantizer].axis, found.quantizers[quantizer].narrow)
    x = tiny_batches(1, seed=3)[0]
    outputs = [quantized_net(rtn.reduce_error(model, [], rtn.Config()))(x) for model in (fresh, found)]
    assert torch.equal(*outputs)


def test_the_history_is_that_of_the_fresh_run_and_says_where_it_comes_from(cache, fresh):
    found = cache.replayed(folded())[0]
    assert [record.stage for record in found.history] == ["fold", "equalise", "calibrate"]
    for ours, theirs in zip(found.history[1:], fresh.history[1:], strict=True):
        assert ours.notes == (*theirs.notes, f"taken from cache {cache.key[:12]}")
        assert json.dumps(ours.details) == json.dumps(theirs.details)
        assert ours.seconds == theirs.seconds


CHANGES = {
    "weights": {"weights": "ac"},
    "an image": {"images": ["cd", "ee"]},
    "order of the images": {"images": ["ef", "cd"]},
    "batch size": {"batch": 5},
    "an option": {"equalise": {"exponents": (0.5, 0.8)}},
    "one option more": {"seed": 0},
}


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("change", CHANGES)
def test_any_other_input_is_a_miss_that_says_so(cache, change):
    other = Cache({**INPUTS, **CHANGES[change]}, cache.folder)
    assert other.replayed(folded()) == (None, f"nothing kept for exactly this input ({other.key[:12]})")


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("part", made_by())
def test_other_code_libraries_or_processor_are_a_miss(cache, monkeypatch, part):
    monkeypatch.setattr("calib.cache.made_by", lambda: {**made_by(), part: "other"})
    assert cache.replayed(folded())[0] is None


def test_the_code_is_every_source_file_of_calib(tmp_path, monkeypatch):
    (tmp_path / "calib/methods").mkdir(parents=True)
    (tmp_path / "calib/methods/one.py").write_text("1")
    monkeypatch.setattr("calib.store.provenance.ROOT", tmp_path)
    before = made_by()["code"]
    (tmp_path / "calib/methods/one.py").write_text("2")
    assert made_by()["code"] != before


def flipped(content: bytes, where: int) -> bytes:
    return content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :]


DAMAGE = {
    "empty": lambda _: b"",
    "truncated": lambda whole: whole[:-1],
    "cut in half": lambda whole: whole[: len(whole) // 2],
    "garbage": lambda _: os.urandom(1000),
    "a flipped bit in a scale": lambda whole: flipped(whole, len(whole) - 3),
    "a flipped bit in a name": lambda whole: flipped(whole, whole.index(b"blocks.1.mlp.fc1:input")),
    "a flipped bit in a note": lambda whole: flipped(whole, whole.index(b"places rescaled")),
    "no utf-8": lambda whole: whole.replace(b"places", b"\xff\xfeaces", 1),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_not_used_and_written_again(cache, fresh, damage):
    path = only_file(cache)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    found, said = cache.replayed(folded())
    assert found is None
    assert str(path) in said
    assert "damaged" in said
    cache.save(fresh)
    assert cache.replayed(folded())[0] is not None


@pytest.mark.usefixtures("fresh")
def test_a_file_under_anothers_name_is_refused(cache):
    other = Cache({**INPUTS, "weights": "ac"}, cache.folder)
    only_file(cache).rename(cache.folder / f"{other.key}.safetensors")
    found, said = other.replayed(folded())
    assert found is None
    assert "made from other inputs than its name says: not used" in said


def test_a_place_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    cache = Cache(INPUTS, tmp_path / "file" / "calibration")
    model = calibrated(folded())
    assert cache.replayed(folded())[0] is None
    assert "cannot be written" in cache.save(model)


def test_switched_off_it_neither_reads_nor_writes(cache, fresh):
    off = dataclasses.replace(cache, folder=None)
    assert off.replayed(folded()) == (None, "off")
    before = only_file(cache).stat().st_mtime_ns
    assert "off" in off.save(fresh)
    assert only_file(cache).stat().st_mtime_ns == before


@pytest.mark.usefixtures("fresh")
def test_nothing_but_the_file_is_left_behind(cache):
    assert [path.name for path in cache.folder.iterdir()] == [f"{cache.key}.safetensors"]


def test_code_is_its_names_and_contents_wherever_it_lies(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place / "room").mkdir(parents=True)
        (tmp_path / place / "room/a.py").write_text("a = 1")
    here, there = tmp_path / "here/room", tmp_path / "there/room"
    first = code_sha256(here)
    assert code_sha256(there) == first
    assert code_sha256(here / "a.py") != code_sha256(here, here / "a.py")
    for change in (lambda: (there / "a.py").write_text("a = 2"), lambda: (there / "a.py").rename(there / "b.py")):
        before = code_sha256(there)
        change()
        assert code_sha256(there) != before
    (here / "notes.txt").write_text("no code")
    assert code_sha256(here) == first
