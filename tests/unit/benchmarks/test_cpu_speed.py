import json
import statistics
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import cpu_speed
from benchmarks.float_twin import float_twin
from benchmarks.peers.run import Contender
from calib.errors import UserError
from deploy.package import MANIFEST, write_json


def test_ratios_are_of_the_same_round_and_above_1_where_the_candidate_is_faster():
    generator = np.random.default_rng(0)
    load = generator.uniform(1, 5, 9)  # of the machine, in every round
    times = {"float": 12 * load, "plain": 6 * load, "integer": 4 * load * generator.uniform(0.9, 1.1, 9)}
    found = cpu_speed.ratios(times)
    assert list(found) == ["float/plain", "float/integer", "plain/integer"]
    assert list(cpu_speed.ratios({**times, "peer": load})) == [
        "float/plain", "float/integer", "float/peer", "plain/integer", "peer/integer",
    ]  # fmt: skip
    assert found["float/plain"]["ratio"] == found["float/plain"]["low"] == pytest.approx(2)
    expected = statistics.median(6 * one / other for one, other in zip(load, times["integer"], strict=True))
    assert found["plain/integer"]["ratio"] == pytest.approx(expected)
    assert found["float/integer"]["ratio"] == pytest.approx(2 * expected)


def test_other_weights_than_those_of_the_package_are_refused(tmp_path):
    weights = {"source": "run 7", "sha256": "0" * 64, "random": True, "module": None}
    preprocessing = {"height": 32, "width": 32}
    write_json(
        tmp_path / MANIFEST, {"model": "test_resnet-random-weights", "weights": weights, "preprocessing": preprocessing}
    )
    with pytest.raises(UserError, match=r"the weights of '.*' are others \(run 7\)"):
        float_twin(tmp_path, "auto")


def test_rows_are_written_with_what_they_were_measured_by(tmp_path, monkeypatch, capsys):
    pair = {"ratio": 1.5, "low": 1.4, "high": 1.6}
    row = {"model": "m", "threads": 1, "batch": 8, "ratios": {"float/plain": pair}}
    monkeypatch.setattr(
        cpu_speed, "measure", lambda folder, how: [row | {"asked": [folder.name, how.weights, how.rounds, how.batch]}]
    )
    monkeypatch.setattr(cpu_speed, "RESULTS", tmp_path)
    monkeypatch.setattr(cpu_speed, "require_package", lambda _folder: None)
    assert cpu_speed.main(["--name", "own", "a", "b", "--rounds", "3"]) == 0
    written = json.loads((tmp_path / "cpu_speed.own.json").read_text())
    assert [each["asked"] for each in written["rows"]] == [["a", "auto", 3, None], ["b", "auto", 3, None]]
    assert written["command"] == "python -m benchmarks.cpu_speed --name own a b --rounds 3"
    assert {"machine", "commit", "date"} <= written.keys()
    assert "m                    1 threads, batch 8  float/plain 1.50 (1.40 to 1.60)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--name", "own", "nowhere"], "error: no package at 'nowhere'"),
        (["--name", "a/b", "nowhere"], "error: --name a/b: expected letters, digits and _"),
        (["--name", "own", "nowhere", "--batch", "0"], "error: --batch 0: expected 1 or more"),
        (["--name", "own", "nowhere", "--rounds", "0"], "error: --rounds 0: expected 1 or more"),
        (["--name", "own", "nowhere", "--threads", "2", "0"], "error: --threads 0: expected 1 or more"),
        (["--name", "own", "nowhere", "--peer-python", "/no"], "error: --peer-python /no: no such file"),
        ([], "error: the following arguments are required: --name, PACKAGE"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, line, capsys):
    assert cpu_speed.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(line)
    assert said.count("\n") == 1


def test_a_network_of_one_s_own_or_of_named_inputs_is_refused(tmp_path):
    weights = {"source": "run 7", "sha256": "0" * 64, "random": True}
    for module, text in (({"factory": "a.py:Net"}, "is of a network of your own"), (None, "takes named inputs")):
        about = {"model": "net", "weights": weights | {"module": module}, "preprocessing": None}
        write_json(tmp_path / MANIFEST, about)
        with pytest.raises(UserError, match=text):
            float_twin(tmp_path, "auto")


def test_each_peer_quantizes_with_its_default_calibration_and_one_that_fails_is_named(tmp_path, monkeypatch):
    def contender(peer, setting):
        return Contender(peer, setting, (peer, setting), f"{peer}-{setting}.onnx", dict)

    known = [
        *(contender("onnxruntime", setting) for setting in ("minmax", "minmax, linears only", "entropy", "percentile")),
        *(contender("modelopt", setting) for setting in ("max", "entropy")),
    ]
    commands, fails = [], set()
    monkeypatch.setattr(cpu_speed, "peer_contenders", lambda *_: known)
    monkeypatch.setattr(
        cpu_speed, "run",
        lambda command: commands.append(command) or SimpleNamespace(error="no such module" if command in fails else None),
    )  # fmt: skip
    found = cpu_speed.peer_graphs(tmp_path, np.zeros((2, 3, 4, 4)), "python")
    wanted = [("onnxruntime", "minmax"), ("onnxruntime", "minmax, linears only"), ("modelopt", "max")]
    assert commands == wanted
    assert found == {f"{peer} {setting}": tmp_path / f"{peer}-{setting}.onnx" for peer, setting in wanted}
    assert np.load(tmp_path / "calib.npy").shape == (2, 3, 4, 4)
    fails.add(("modelopt", "max"))
    with pytest.raises(UserError, match=r"^modelopt max: no such module$"):
        cpu_speed.peer_graphs(tmp_path, np.zeros((2, 3, 4, 4)), "python")
