import json
import subprocess
import sys

import numpy as np
import onnx
import psutil
import pytest
from onnx import numpy_helper, parser

from benchmarks.peers import inputs as peers_inputs
from benchmarks.peers import run as peers
from benchmarks.peers.quantizers import activation_products, quantize_with_onnxruntime
from benchmarks.peers.run import Contender, Inputs, Outcome, Row
from calib.weights.load import LoadedNet
from tests.tiny import SIZE, tiny_net

# A convolution, a product with a weight, and a product of two activations as in attention.
GRAPH = """
<ir_version: 10, opset_import: ["" : 21]>
tiny (float[batch, 3, 8, 8] input) => (float[batch, 4] output) {
    [conv] features = Conv (input, conv_weight)
    [flat] tokens = Reshape (features, shape)
    [linear] rows = MatMul (tokens, weight)
    [keys] columns = Transpose <perm = [0, 2, 1]> (rows)
    [scores] products = MatMul (rows, columns)
    [pool] output = ReduceMean <keepdims = 0> (products, last_axis)
}
"""


def images(count, seed):
    return np.random.default_rng(seed).standard_normal((count, 3, 8, 8)).astype(np.float32)


@pytest.fixture
def inputs(tmp_path):
    random = np.random.default_rng(0)
    model = parser.parse_model(GRAPH)
    for name, value in {
        "conv_weight": random.standard_normal((4, 3, 3, 3)).astype(np.float32),
        "weight": random.standard_normal((36, 36)).astype(np.float32),
        "shape": np.array([0, 4, 36]),
        "last_axis": np.array([2]),
    }.items():
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    onnx.checker.check_model(model, full_check=True)
    found = Inputs(tmp_path)
    onnx.save(model, found.float_model)
    np.save(found.calibration, images(5, seed=1))
    np.save(found.evaluation, images(9, seed=2))
    (tmp_path / "about.json").write_text(json.dumps({"task": "classifier", "calibration": {"count": 5}}))
    return found


def contender(inputs, tool, setting, python=sys.executable):
    offered = peers.peer_contenders(inputs, inputs.folder, python)
    return next(each for each in offered if (each.peer, each.setting) == (tool, setting))


def fake(code):
    return Contender("fake", "default", (sys.executable, "-c", code), "*.nothing", peers.read_last_line)


def test_a_row_holds_fidelity_speed_time_and_memory(inputs, capsys):
    row = peers.measure(contender(inputs, "onnxruntime", "minmax"), inputs, inputs.folder)
    assert row.error is None
    assert row.fidelity["count"] == 9
    assert 15 < row.fidelity["sqnr_db"] < 60  # 8 bits give some 30 dB here; 200 dB would mean that nothing rounds
    assert row.fidelity["kl"] is not None
    assert row.speed["low"] <= row.speed["ratio"] <= row.speed["high"]
    assert 0 < row.seconds < 60
    assert 20 < row.peak_rss_mb < 10_000
    assert row.version == row.packages["onnxruntime"]
    peers.print_table("tiny", [row])
    assert f"{row.fidelity['sqnr_db']:.1f}" in capsys.readouterr().out
    assert (
        json.loads(json.dumps(peers.result_json(inputs.about, "a command", [row])))["rows"][0]["peer"] == "onnxruntime"
    )


def rounded_layers(quantized):
    graph = onnx.load(quantized).graph
    producers = {output: node.op_type for node in graph.node for output in node.output}
    layers = (node for node in graph.node if node.op_type in ("Conv", "MatMul"))
    return {node.name for node in layers if all(producers.get(name) == "DequantizeLinear" for name in node.input)}


def test_linears_only_leaves_the_product_of_activations_in_float(inputs, tmp_path):
    assert activation_products(onnx.load(inputs.float_model)) == ["scores"]
    for linears_only, expected in ((False, {"conv", "linear", "scores"}), (True, {"conv", "linear"})):
        quantized = tmp_path / "quantized.onnx"
        quantize_with_onnxruntime("minmax", linears_only, inputs.float_model, inputs.calibration, quantized)
        assert rounded_layers(quantized) == expected


def test_a_graph_without_attention_is_not_measured_twice(inputs):
    model = onnx.load(inputs.float_model)
    assert any("linears only" in each.setting for each in peers.peer_contenders(inputs, inputs.folder, sys.executable))
    model.graph.node[4].input[1] = "weight"
    onnx.save(model, inputs.float_model)
    settings = [each.setting for each in peers.peer_contenders(inputs, inputs.folder, sys.executable)]
    assert settings == ["minmax", "entropy", "percentile", "max", "entropy"]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("print('talk'); raise ValueError('boom')", "ValueError: boom"),
        ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
        ("import sys; sys.exit(7)", "exit code 7"),
        ('print(\'{"version": "1", "seconds": 2}\')', "wrote no model"),
    ],
)
def test_a_peer_that_fails_is_a_row_with_its_last_line(inputs, capsys, code, error):
    row = peers.measure(fake(code), inputs, inputs.folder)
    assert row.error == error
    assert row.fidelity is None
    peers.print_table("tiny", [row])
    assert f"fake, default: {error}" in capsys.readouterr().out


def test_a_model_that_onnx_runtime_refuses_is_a_row(inputs):
    (inputs.folder / "broken.onnx").write_bytes(b"no graph")
    broken = Contender(
        "fake",
        "default",
        fake('print(\'{"version": "1", "seconds": 2}\')').command,
        "broken.onnx",
        peers.read_last_line,
    )
    row = peers.measure(broken, inputs, inputs.folder)
    assert row.error.startswith("ONNX Runtime cannot run its model: ")
    assert row.seconds == 2


def test_a_peer_that_wants_all_memory_fails_alone(inputs, monkeypatch):
    monkeypatch.setattr(peers, "MEMORY_SHARE", 0.05)
    half = psutil.virtual_memory().available // 2  # which the machine would grant
    row = peers.measure(fake(f"import time; time.sleep(0.3); bytearray({half})"), inputs, inputs.folder)
    assert row.error == "MemoryError"


def test_a_missing_peer_says_how_to_install_it(inputs, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty"], check=True)
    found = contender(inputs, "modelopt", "max", str(tmp_path / "empty/bin/python"))
    row = peers.measure(found, inputs, inputs.folder)
    assert row == Row("modelopt", "max", row.peak_rss_mb, "not installed (pip install -r requirements-peers.txt)")


def test_our_seconds_are_those_up_to_the_onnx_file():
    report = {"commit": "abc", "seconds": {"load": 1, "rtn": 2, "export": 4, "build": 8, "total": 15}}
    assert peers.read_report(json.dumps(report)) == {"version": "abc", "seconds": 7}


def test_we_take_part_with_every_recipe_drawing_the_same_images(inputs):
    from deploy.recipe import recipe_names

    assert tuple(peers.our_recipes()) == recipe_names()
    ours = list(peers.our_contenders("dinov2_s", peers.our_recipes(), inputs, inputs.folder))
    assert tuple(each.setting for each in ours) == recipe_names()
    for each in ours:
        assert "--calib" not in each.command  # drawn by seed, as peers_inputs does
        assert each.command[each.command.index("--calib-images") + 1] == "5"


def test_some_recipes_can_be_named_and_no_others(inputs, capsys):
    (one,) = peers.our_contenders("dinov2_s", ["int8_erq"], inputs, inputs.folder)
    assert one.setting == "int8_erq"
    with pytest.raises(SystemExit) as stop:
        peers.main(["--recipes", "int9"])
    assert stop.value.code == 2
    assert "int8_erq" in capsys.readouterr().err


def test_bad_input_ends_with_its_one_line_and_writes_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "RESULTS", tmp_path)
    monkeypatch.setattr(peers, "run", lambda _command: Outcome(2, "", "progress\nerror: Unknown model 'x'\n", 1.0))
    assert peers.main(["--models", "x"]) == 2
    assert capsys.readouterr().err == "error: Unknown model 'x'\n"
    assert not list(tmp_path.iterdir())


def test_the_inputs_are_the_float_network_and_images_of_two_sets(tmp_path, monkeypatch):
    net = tiny_net("vit")
    config = {
        "input_size": (3, SIZE, SIZE), "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center",
        "mean": (0.5,) * 3, "std": (0.5,) * 3,
    }  # fmt: skip
    monkeypatch.setattr(peers_inputs, "load_net", lambda _spec: LoadedNet(net, "tiny", "", True, config))
    assert peers_inputs.main(["vit_b", str(tmp_path), "--calib-images", "3", "--eval-images", "2"]) == 0
    found = Inputs(tmp_path)
    calibration, evaluation = np.load(found.calibration), np.load(found.evaluation)
    assert calibration.shape == (3, 3, SIZE, SIZE)
    assert evaluation.shape == (2, 3, SIZE, SIZE)
    assert found.about["task"] == "classifier"
    assert len(activation_products(onnx.load(found.float_model))) == 2 * 2
    assert peers_inputs.main(["no_such_model", str(tmp_path)]) == 2
