"""The command from end to end on small networks with random weights."""

import json
import re

import numpy as np
import pytest
import torch

from benchmarks.language import networks
from benchmarks.language.__main__ import RANDOM, main

pytest.importorskip("transformers")

CHEAP = "w4_g128,w4_g128_qwt,smoothquant_8,smoothquant_8_adaq"


@pytest.fixture
def ids(tmp_path):
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 100, (15, 8)))
    return tmp_path / "ids.npy"


def perplexity_by_hand(name, ids):
    net, told = networks.load(name, ids.shape[1]).net.net, torch.from_numpy(ids)
    with torch.no_grad():
        logits = net(input_ids=told).logits
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), told[:, 1:].flatten()).exp())


@pytest.mark.parametrize("name", sorted(networks.SMALL))
def test_rows_are_measured_and_written_where_the_user_says(ids, tmp_path, capsys, name):
    out = tmp_path / "found.json"
    assert main([name, "--ids", str(ids), "--rows", CHEAP, "--out", str(out), "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert RANDOM in shown
    assert re.search(r"^w4_g128_qwt: (dropped: )?branches (fitted )?at", shown, re.MULTILINE), shown
    assert re.search(r"w4_g128_qwt .*[+-]\d\.\d{4} ± \d\.\d{4} .*\d% .*\d dB", shown), shown
    found = json.loads(out.read_text())
    assert (found["weights"]["random"], found["ids"]["shape"]) == (True, [15, 8])
    rows = {one["row"]: one for one in found["rows"]}
    assert [*rows] == ["float", *CHEAP.split(",")]
    assert rows["float"]["figures"]["agreement"] == 1
    assert rows["float"]["figures"]["perplexity"] == pytest.approx(
        perplexity_by_hand(name, np.load(ids)[-3:]), rel=1e-4
    )
    assert {one["figures"]["texts"] for one in found["rows"]} == {3}
    assert 5 < rows["w4_g128"]["figures"]["sqnr_db"] < 25 < rows["smoothquant_8"]["figures"]["sqnr_db"]
    stages = {name: [record["stage"] for record in one["stages"]] for name, one in rows.items()}
    assert stages["w4_g128_qwt"] == ["fold", "calibrate", "rtn", "qwt"]
    assert stages["smoothquant_8_adaq"] == ["fold", "equalise", "calibrate", "adaq"]
    moved = next(record for record in rows["smoothquant_8"]["stages"] if record["stage"] == "equalise")["notes"][0]
    assert re.fullmatch(r"channel scales moved at (\d+) of \1 places, .* exponents of the scales 0\.5 x\1", moved), (
        moved
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(networks.SMALL))
def test_learned_rows_run(ids, capsys, name):
    assert main([name, "--ids", str(ids), "--rows", "smoothquant_6_adaqtransform", "--device", "cpu"]) == 0
    assert "smoothquant_6_adaqtransform" in capsys.readouterr().out


BAD = {
    "no ids": (["small_opt"], "the following arguments are required: --ids"),
    "no such file": (["small_opt", "--ids", "none.npy"], "'none.npy' cannot be read"),
    "no such row": (["small_opt", "--ids", "IDS", "--rows", "w4"], "--rows: unknown row 'w4'"),
    "no such model": (["nowhere", "--ids", "IDS"], "no folder 'nowhere'"),
    "no such device": (["small_opt", "--ids", "IDS", "--device", "gpu"], "DEVICE='gpu'"),
    "no such place": (["small_opt", "--ids", "IDS", "--out", "nowhere/x.json"], "--out 'nowhere/x.json'"),
    "beyond the vocabulary": (["small_opt", "--ids", "LARGE"], "holds the id 100: expected ids from 0 to 99"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(ids, tmp_path, capsys, case):
    words, message = BAD[case]
    np.save(tmp_path / "large.npy", np.full((10, 8), 100))
    paths = {"IDS": str(ids), "LARGE": str(tmp_path / "large.npy")}
    assert main([paths.get(word, word) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
