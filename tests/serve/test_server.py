"""A real Triton server (2.51) serves what `serve-repo` wrote: its answers are those of ONNX Runtime, bit for bit."""

import hashlib
import json
import shutil
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from calib.errors import UserError
from calib.images.preprocess import Preprocessing, array_from_image
from calib.task import boxes_of
from deploy.engine.packaged import runner_of_package
from deploy.measure.boxes import decoded
from deploy.measure.onnx_runner import OnnxRunner
from deploy.serve.activate import activate, rollback
from deploy.serve.client import Client
from deploy.serve.preflight import Allowed
from deploy.serve.repository import write_repository
from deploy.serve.server import running
from deploy.serve.shipped import shipped_from_package
from tests.serve.environments import ROOT, with_this_numpy

pytestmark = pytest.mark.slow
CLASSES = [f"class {index}" for index in range(1000)]
SIDE = 160


def images(count, seed=0, size=SIDE):
    return np.random.default_rng(seed).normal(size=(count, 3, size, size)).astype(np.float32)


@pytest.fixture(scope="module")
def repository(tmp_path_factory, serve_python, package, detector, for_cpu, boxed):
    """A repository of three networks, one for CPUs too, written by the command line in an environment without torch."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "labels").write_text("\n".join(CLASSES) + "\n")
    given = (
        [str(package), "--name", "vit", "--labels", str(folder / "labels")],
        [str(detector), "--name", "det", "--allow-random-weights"],
        [str(for_cpu), "--name", "fast"],
        [str(boxed), "--name", "boxed", "--allow-random-weights"],
    )
    for index, each in enumerate(given):
        command = [serve_python, "-m", "deploy", "serve-repo", *each, "--repo", str(folder / f"part{index}")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        backend = "onnxruntime" if "fast" in each else "tensorrt_rtx"
        assert f"no engine in the repository: model.engine is of {backend}" in done.stderr
    for other in ("part1", "part2", "part3"):
        shutil.copytree(folder / other, folder / "part0", dirs_exist_ok=True)
    return folder / "part0"


@pytest.fixture(scope="module")
def server(triton, repository):
    with running(triton, repository) as found:
        yield found


@pytest.fixture(scope="module")
def runner(package):
    return OnnxRunner(package / "model.fp32.onnx")


def protocol(server, kind):
    """(module of the client, client) of one protocol."""
    import tritonclient.grpc
    import tritonclient.http

    module = {"http": tritonclient.http, "grpc": tritonclient.grpc}[kind]
    return module, module.InferenceServerClient(getattr(server, kind))


def asked(server, kind, model, name, array, dtype, **options):
    module, client = protocol(server, kind)
    tensor = module.InferInput(name, list(array.shape), dtype)
    tensor.set_data_from_numpy(array)
    return client.infer(model, [tensor], **options)


def test_a_package_is_verified_where_only_serving_is_installed(serve_python, package):
    command = [serve_python, "-m", "deploy", "verify", str(package)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "files unchanged, golden outputs reproduced by the graph" in done.stdout


@pytest.mark.parametrize("kind", ["http", "grpc"])
@pytest.mark.parametrize("count", [1, 3, 32])
def test_answers_are_those_of_onnx_runtime_bit_for_bit(server, runner, kind, count):
    found = asked(server, kind, "vit_cpu", "input", images(count), "FP32").as_numpy("output")
    assert found.dtype == np.float32
    assert np.array_equal(found, runner(images(count)))


def test_an_engine_for_cpus_is_what_the_server_runs(server, repository, for_cpu):
    folder = repository / "fast_cpu/1"
    assert (folder / "model.engine").read_bytes() == (for_cpu / "model.engine").read_bytes()
    assert not (folder / "model.fp32.onnx").exists()
    found = asked(server, "http", "fast_cpu", "input", images(3), "FP32").as_numpy("output")
    with runner_of_package(for_cpu) as run:
        assert np.array_equal(found, run({"input": images(3)})["output"])


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_every_output_of_a_network_with_several_arrives(server, detector, kind):
    given = images(2, size=32)
    expected = OnnxRunner(detector / "model.fp32.onnx").named_outputs(given)
    found = asked(server, kind, "det_cpu", "input", given, "FP32")
    assert list(expected) == ["scores_0", "scores_1", "boxes"]
    for name, value in expected.items():
        assert np.array_equal(found.as_numpy(name), value)


def test_many_clients_at_once_get_their_own_answers(server, runner):
    def ask(seed):
        given = images(1 + seed % 4, seed)
        found = asked(server, ("http", "grpc")[seed % 2], "vit_cpu", "input", given, "FP32").as_numpy("output")
        return np.array_equal(found, runner(given))

    before = executions(server)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(64)))
    assert 0 < executions(server) - before < 64  # requests were joined into batches


def executions(server):
    _, client = protocol(server, "http")
    return client.get_inference_statistics("vit_cpu")["model_stats"][0]["execution_count"]


REFUSED = {
    "another shape": (images(1, size=96), "FP32", r"unexpected shape .* Expected \[-1,3,160,160\], got \[1,3,96,96\]"),
    "no batch axis": (images(1)[0], "FP32", r"unexpected shape"),
    "another type": (images(1).astype(np.float16), "FP16", r"data-type is 'FP16', but .* expects 'FP32'"),
    "too many images": (images(33), "FP32", r"batch-size must be <= 32"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_wrong_requests_are_refused_and_hurt_nobody(server, runner, kind, case):
    from tritonclient.utils import InferenceServerException

    given, dtype, said = REFUSED[case]
    with pytest.raises(InferenceServerException, match=said):
        asked(server, kind, "vit_cpu", "input", given, dtype)
    found = asked(server, kind, "vit_cpu", "input", images(1), "FP32").as_numpy("output")
    assert np.array_equal(found, runner(images(1)))


def files_of(pictures, *names):
    return np.array([[(pictures / name).read_bytes()] for name in names], dtype=object)


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_an_image_file_gives_what_the_package_s_own_preprocessing_gives(server, runner, package, pictures, kind):
    names = ["00.png", "01.jpg", "03.jpg"]
    preprocessing = Preprocessing.from_json(json.loads((package / "manifest.json").read_text())["preprocessing"])
    arrays = np.stack([array_from_image(Image.open(pictures / name), preprocessing) for name in names])
    found = asked(server, kind, "vit_cpu_jpeg", "image", files_of(pictures, *names), "BYTES").as_numpy("output")
    assert np.array_equal(found, runner(arrays))


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_an_image_file_gives_the_boxes_that_the_package_was_judged_by(server, boxed, pictures, kind):
    names = ["00.png", "01.jpg", "03.jpg"]
    manifest = json.loads((boxed / "manifest.json").read_text())
    preprocessing = Preprocessing.from_json(manifest["preprocessing"])
    arrays = np.stack([array_from_image(Image.open(pictures / name), preprocessing) for name in names])
    outputs = OnnxRunner(boxed / "model.fp32.onnx").named_outputs(arrays)
    shapes = {name: value.shape[1:] for name, value in outputs.items()}
    expected = list(decoded(outputs, boxes_of(manifest["boxes"], shapes, "the test")))
    found = asked(server, kind, "boxed_cpu_jpeg", "image", files_of(pictures, *names), "BYTES")
    count = found.as_numpy("num_detections")[:, 0]
    assert count.tolist() == [len(each.scores) for each in expected]
    assert min(count) > 0
    for index, each in enumerate(expected):
        rows = {name: found.as_numpy(f"detection_{name}")[index] for name in ("boxes", "scores", "classes")}
        shown = slice(count[index])
        np.testing.assert_allclose(rows["boxes"][shown] * (48, 32, 48, 32), each.places, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(rows["scores"][shown], each.scores, rtol=1e-6)
        assert np.array_equal(rows["classes"][shown], each.classes)
        assert not any(each[count[index] :].any() for each in rows.values())


def test_the_server_names_the_classes(server, pictures):
    module, client = protocol(server, "http")
    given = files_of(pictures, "01.jpg")
    tensor = module.InferInput("image", list(given.shape), "BYTES")
    tensor.set_data_from_numpy(given)
    outputs = [module.InferRequestedOutput("output", class_count=2)]
    logits = client.infer("vit_cpu_jpeg", [tensor]).as_numpy("output")[0]
    best = [
        each.decode().split(":")
        for each in client.infer("vit_cpu_jpeg", [tensor], outputs=outputs).as_numpy("output")[0]
    ]
    first, second = np.argsort(-logits)[:2]
    assert [(int(index), label) for _, index, label in best] == [(first, CLASSES[first]), (second, CLASSES[second])]


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_a_damaged_image_is_named_by_its_place(server, pictures, kind):
    from tritonclient.utils import InferenceServerException

    given = files_of(pictures, "01.jpg", "03.jpg")
    given[1, 0] = given[1, 0][:100]
    with pytest.raises(
        InferenceServerException, match=r"image 1 of the request cannot be decoded .*expected JPEG, PNG"
    ):
        asked(server, kind, "vit_cpu_jpeg", "image", given, "BYTES")
    assert asked(server, kind, "vit_cpu_jpeg", "image", given[:1], "BYTES").as_numpy("output").shape == (1, 1000)


def test_the_server_tells_which_package_it_serves(server, package):
    _, client = protocol(server, "http")
    digest = hashlib.sha256((package / "manifest.json").read_bytes()).hexdigest()
    assert client.get_model_config("vit_cpu")["parameters"]["manifest_id"] == {"string_value": digest}


def test_a_server_whose_numpy_falsifies_tensors_does_not_start(triton, repository, tmp_path):
    if int(np.__version__.split(".")[0]) < 2:
        pytest.skip("no numpy 2 here to try it with")
    with (
        pytest.raises(UserError, match=r"did not start.*returns other numbers than it was given"),
        running(with_this_numpy(triton, tmp_path), repository, ["vit_cpu"]),
    ):
        pass


def test_a_graph_that_has_changed_is_not_served(triton, repository, tmp_path):
    shutil.copytree(repository, tmp_path / "models")
    graph = tmp_path / "models/vit_cpu/1/model.fp32.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"\x00")
    with (
        pytest.raises(UserError, match=r"did not start.*model\.fp32\.onnx has changed since it was packaged"),
        running(triton, tmp_path / "models", ["vit_cpu"]),
    ):
        pass


def test_the_server_is_stopped_at_the_end_and_starts_again(triton, repository, runner):
    for _ in range(2):
        with running(triton, repository, ["vit_cpu"]) as found:
            answer = asked(found, "http", "vit_cpu", "input", images(1), "FP32").as_numpy("output")
            assert np.array_equal(answer, runner(images(1)))
        assert found.process.returncode == 0


def test_the_command_serves_until_it_is_interrupted(triton, repository, serve_python, runner):
    command = [serve_python, "-m", "deploy", "serve", "--repo", str(repository), "--environment", str(triton)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        words = process.stdout.readline().split()
        assert words[::2] == ["HTTP", "gRPC", "metrics"]
        found = Client(words[1]).answer("vit_cpu", {"input": images(1)})
        assert np.array_equal(found["output"], runner(images(1)))
        models = "boxed_cpu, boxed_cpu_jpeg, det_cpu, det_cpu_jpeg, fast_cpu, fast_cpu_jpeg, vit_cpu, vit_cpu_jpeg"
        assert process.stdout.readline().startswith(f"models: {models};")
    finally:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said


# Switching versions.


@pytest.fixture
def switched(triton, package, newer, tmp_path):
    """A server on a repository of its own: (repository, client of the server, runners of both packages)."""
    shipped = shipped_from_package(package)
    write_repository([shipped], tmp_path / "models", "vit", Allowed())
    runners = {name: OnnxRunner(each / "model.fp32.onnx") for name, each in (("old", package), ("new", newer))}
    with running(triton, tmp_path / "models") as found:
        yield tmp_path / "models", Client(found.http), runners


def serving(client, runners):
    """Which package the server answers with: "old", "new" or neither."""
    found = client.answer("vit_cpu", {"input": images(2)})["output"]
    return [name for name, runner in runners.items() if np.array_equal(found, runner(images(2)))]


def test_a_switch_and_back_while_clients_ask(switched, newer):
    repository, client, runners = switched
    stop, seen = threading.Event(), []

    def ask():
        own = Client(client.url)
        while not stop.is_set():
            seen.append(serving(own, runners))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        packages = [shipped_from_package(newer)]
        assert activate(packages, repository, client, "vit", Allowed()) == {"vit_cpu": (1, 2)}
        assert serving(client, runners) == ["new"]
        assert rollback(repository, client, "vit") == {"vit_cpu": (2, 1)}
        assert serving(client, runners) == ["old"]
    finally:
        stop.set()
        asking.join()
    assert {tuple(each) for each in seen} == {("old",), ("new",)}  # every answer is of one package, none was refused


def refused(serve_python, package, switched):
    """What `activate` says of a package that it does not switch to: the old version goes on, the new one is gone."""
    repository, client, runners = switched
    command = [serve_python, "-m", "deploy", "activate", str(package), "--repo", str(repository), "--url", client.url]
    done = subprocess.run([*command, "--name", "vit"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert serving(client, runners) == ["old"]
    assert not (repository / "vit_cpu/2").exists()
    return done.stderr


def test_a_version_that_does_not_load_leaves_the_old_one_serving(switched, newer, tmp_path, serve_python):
    """Its graph is no graph, though its digests fit."""
    broken = tmp_path / "broken"
    shutil.copytree(newer, broken)
    (broken / "model.fp32.onnx").write_bytes(b"no graph")
    record_again(broken)
    said = refused(serve_python, broken, switched)
    assert "load failed for model 'vit_cpu': version 2 is at UNAVAILABLE state" in said


def record_again(folder):
    """Let the manifest record the files as they are now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        manifest["files"][name]["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_version_that_answers_wrongly_leaves_the_old_one_serving(switched, package, newer, tmp_path, serve_python):
    """It loads, but its golden outputs are those of another network."""
    wrong = tmp_path / "wrong"
    shutil.copytree(newer, wrong)
    shutil.copy(package / "golden.npz", wrong / "golden.npz")
    record_again(wrong)
    assert "version 2 of 'vit_cpu' answers wrongly: it reaches" in refused(serve_python, wrong, switched)


KILLED = """
import os, signal, sys
from pathlib import Path
from deploy.serve import activate
from deploy.serve.client import Client
from deploy.serve.preflight import Allowed
from deploy.serve.shipped import shipped_from_package
Client.answer = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
package, repository, url = sys.argv[1:]
activate.activate([shipped_from_package(Path(package))], Path(repository), Client(url), "vit", Allowed())
"""


def test_a_run_killed_after_the_load_is_made_good_by_the_next(switched, package, newer, triton, serve_python):
    repository, client, runners = switched
    command = [serve_python, "-c", KILLED, str(newer), str(repository), client.url]
    assert subprocess.run(command, cwd=ROOT, check=False, timeout=60).returncode == -signal.SIGKILL
    with running(triton, repository) as again:  # what a restarted server takes
        assert serving(Client(again.http), runners) == ["old"]
    assert serving(client, runners) == ["new"]  # loaded, and not yet asked
    assert activate([shipped_from_package(package)], repository, client, "vit", Allowed()) == {"vit_cpu": (1, 2)}
    assert serving(client, runners) == ["old"]  # version 2 is another one now
    assert activate([shipped_from_package(newer)], repository, client, "vit", Allowed()) == {"vit_cpu": (2, 3)}
    assert serving(client, runners) == ["new"]
    with running(triton, repository) as again:
        assert serving(Client(again.http), runners) == ["new"]
