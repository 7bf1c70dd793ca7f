"""A real Triton server serves networks with named inputs: its answers are those of ONNX Runtime, bit for bit."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from deploy.measure.onnx_runner import OnnxRunner
from deploy.serve.activate import activate, rollback
from deploy.serve.client import Client
from deploy.serve.preflight import Allowed
from deploy.serve.server import running
from deploy.serve.shipped import shipped_from_package
from tests.pipeline.test_named_inputs import samples
from tests.serve.conftest import sentences
from tests.serve.environments import ROOT

pytestmark = pytest.mark.slow
TYPES = {"int64": "INT64", "int32": "INT32", "float32": "FP32", "bool": "BOOL"}


@pytest.fixture(scope="module")
def repository(tmp_path_factory, serve_python, sentence, denoiser):
    """A repository of both networks, written by the command line in an environment without torch."""
    folder = tmp_path_factory.mktemp("repository")
    for package, name in ((sentence, "sentence"), (denoiser, "denoiser")):
        command = [serve_python, "-m", "deploy", "serve-repo", str(package), "--name", name, "--allow-random-weights"]
        command += ["--repo", str(folder / name)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"written to {folder / name}: {name}_cpu\n"
        assert [each.name for each in (folder / name).iterdir()] == [f"{name}_cpu"]
        shutil.copytree(folder / name, folder / "models", dirs_exist_ok=True)
    return folder / "models"


@pytest.fixture(scope="module")
def server(triton, repository):
    with running(triton, repository) as found:
        yield found


def asked(server, kind, model, given):
    """The outputs of the model by name."""
    import tritonclient.grpc
    import tritonclient.http

    module = {"http": tritonclient.http, "grpc": tritonclient.grpc}[kind]
    client, sent = module.InferenceServerClient(getattr(server, kind)), []
    for name, array in given.items():
        tensor = module.InferInput(name, list(array.shape), TYPES[array.dtype.name])
        tensor.set_data_from_numpy(array)
        sent.append(tensor)
    return client.infer(model, sent).as_numpy("output")


@pytest.mark.parametrize("kind", ["http", "grpc"])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_answers_on_ids_and_masks_are_those_of_onnx_runtime_bit_for_bit(server, sentence, kind, count):
    given = sentences(count, seed=1)
    assert np.array_equal(asked(server, kind, "sentence_cpu", given), OnnxRunner(sentence / "model.fp32.onnx")(given))


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_one_number_per_sample_a_mask_and_a_latent_arrive(server, denoiser, kind):
    given = samples(3, seed=1)["denoiser"]
    expected = OnnxRunner(denoiser / "model.fp32.onnx")(given)
    found = asked(server, kind, "denoiser_cpu", {**given, "t": given["t"][:, None]})
    assert found.shape == (3, 4, 8, 8)
    assert np.array_equal(found, expected)


def own_answer(found, expected):
    """Whether an answer is the expected one: sums in a batch with others round differently, other texts are far away."""
    return np.abs(found - expected).max() < 1e-3 < 0.1 < np.abs(expected).max()


def test_many_clients_at_once_get_their_own_answers(server, sentence):
    runner = OnnxRunner(sentence / "model.fp32.onnx")

    def ask(seed):
        given = sentences(1 + seed % 3, seed)
        return own_answer(asked(server, ("http", "grpc")[seed % 2], "sentence_cpu", given), runner(given))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(48)))


GOOD = sentences(1)
REFUSED = {
    "another type": (
        {**GOOD, "input_ids": GOOD["input_ids"].astype(np.int32)},
        r"input 'input_ids' data-type is 'INT32', but model 'sentence_cpu' expects 'INT64'",
    ),
    "another length": (
        {name: array[:, :7] for name, array in GOOD.items()},
        r"unexpected shape for input '\w+' .* Expected \[-1,12\], got \[1,7\]",
    ),
    "too many": (sentences(5), r"batch-size must be <= 4 for 'sentence_cpu'"),
    "one input alone": ({"input_ids": GOOD["input_ids"]}, r"expected 2 inputs but got 1 inputs for model 'sentence_cpu'"),
    "ids of another vocabulary": (
        {**GOOD, "input_ids": GOOD["input_ids"] + 50},
        r"the network cannot read this: .*indices element out of data bounds, idx=\d+ must be within",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_wrong_requests_are_refused_in_one_line(server, kind, case):
    from tritonclient.utils import InferenceServerException

    given, said = REFUSED[case]
    with pytest.raises(InferenceServerException, match=said) as refused:
        asked(server, kind, "sentence_cpu", given)
    assert "\n" not in refused.value.message()


def test_a_wrong_request_does_not_hurt_those_beside_it(server, sentence):
    """Requests that come together are run as one batch, which the wrong one spoils."""
    from tritonclient.utils import InferenceServerException

    runner, wrong = OnnxRunner(sentence / "model.fp32.onnx"), REFUSED["ids of another vocabulary"][0]

    def ask(seed):
        if seed % 4 == 0:
            with pytest.raises(InferenceServerException, match="the network cannot read this"):
                asked(server, "http", "sentence_cpu", wrong)
            return True
        given = sentences(1, seed)
        return own_answer(asked(server, "http", "sentence_cpu", given), runner(given))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(64)))


@pytest.mark.parametrize("name", ["sentence", "denoiser"])
def test_a_new_version_is_asked_for_the_golden_samples(server, repository, request, name):
    package = request.getfixturevalue(name)
    client, packages = Client(server.http), [shipped_from_package(package)]
    assert activate(packages, repository, client, name, Allowed()) == {f"{name}_cpu": (1, 2)}
    assert rollback(repository, client, name) == {f"{name}_cpu": (2, 1)}


def test_it_may_be_served_says_preflight(serve_python, sentence):
    command = [serve_python, "-m", "deploy", "preflight", str(sentence), "--cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "its weights are random" in done.stderr
    done = subprocess.run([*command, "--allow-random-weights"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
