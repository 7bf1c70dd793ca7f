"""Switching versions, with a server that stands in for Triton and runs killed at every step."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from calib.errors import UserError
from calib.store.digests import file_sha256
from deploy.errors import ContractError
from deploy.lock import locked
from deploy.measure.onnx_runner import OnnxRunner
from deploy.serve import activate as module
from deploy.serve.activate import activate, golden_fault, rollback
from deploy.serve.client import Client
from deploy.serve.configs import config_from_text, served_version
from deploy.serve.preflight import Allowed
from deploy.serve.repository import write_repository
from deploy.serve.shipped import shipped_from_package

pytestmark = pytest.mark.slow


class StandIn:
    """Loads what Triton would load, and answers with the graph of that version in ONNX Runtime."""

    def __init__(self, repository):
        self.repository, self.loaded, self.refuses, self.noise = repository, {}, (), 0.0

    def require_live(self):
        pass

    def load(self, model, config=None):
        config = config or config_from_text((self.repository / model / "config.pbtxt").read_text())
        version = served_version(config)
        if (model, version) in self.refuses:
            raise ContractError(f"version {version} is at UNAVAILABLE state")
        assert (self.repository / model / str(version)).is_dir()
        self.loaded[model] = version

    def ready(self, _model):
        return False

    def answer(self, model, inputs):
        folder = self.repository / f"{model.removesuffix('_cpu')}_cpu" / str(self.loaded[model])
        found = OnnxRunner(folder / "model.fp32.onnx").named_outputs(inputs)
        return {name: value + self.noise for name, value in found.items()}


@pytest.fixture
def repository(package, tmp_path):
    write_repository([shipped_from_package(package)], tmp_path / "models", "net", Allowed())
    return tmp_path / "models"


@pytest.fixture
def server(repository):
    return StandIn(repository)


def switch(folder, repository, server):
    return activate([shipped_from_package(folder)], repository, server, "net", Allowed())


def named(repository, model="net_cpu"):
    return served_version(config_from_text((repository / model / "config.pbtxt").read_text()))


def whole(folder: Path):
    """Whether a version folder holds a graph that its manifest knows, and its own configuration."""
    recorded = json.loads((folder / "manifest.json").read_text())["files"]["model.fp32.onnx"]["sha256"]
    config = config_from_text((folder / "config.pbtxt").read_text())
    return file_sha256(folder / "model.fp32.onnx") == recorded and served_version(config) == int(folder.name)


def test_versions_go_up_and_back(repository, server, package, newer):
    assert switch(newer, repository, server) == {"net_cpu": (1, 2)}
    assert switch(package, repository, server) == {"net_cpu": (2, 3)}
    assert rollback(repository, server, "net") == {"net_cpu": (3, 2)}
    assert (named(repository), server.loaded) == (2, {"net_cpu": 2})
    assert switch(package, repository, server) == {"net_cpu": (2, 3)}  # the version given up has gone
    assert rollback(repository, server, "net") == {"net_cpu": (3, 2)}
    assert rollback(repository, server, "net") == {"net_cpu": (2, 1)}
    with pytest.raises(UserError, match="serves version 1: expected an older one"):
        rollback(repository, server, "net")


def test_engine_and_graph_switch_together_or_not_at_all(engine, newer, tmp_path):
    repository = tmp_path / "models"
    write_repository([shipped_from_package(engine())], repository, "net", Allowed())
    server, new = StandIn(repository), engine(base=newer)
    server.refuses = {("net_cpu", 2)}
    with pytest.raises(ContractError, match="UNAVAILABLE"):
        switch(new, repository, server)
    assert server.loaded == {"net": 1, "net_cpu": 1}
    assert [named(repository, model) for model in ("net", "net_cpu")] == [1, 1]
    server.refuses = ()
    assert switch(new, repository, server) == {"net": (1, 2), "net_cpu": (1, 2)}
    with pytest.raises(UserError, match=r"'net' serves an engine: model.engine is of tensorrt_rtx"):
        switch(newer, repository, server)


@pytest.mark.parametrize("noise", [1.0, np.nan])
def test_a_version_that_answers_wrongly_is_taken_back(repository, server, newer, noise):
    server.noise = noise
    with pytest.raises(ContractError, match=r"version 2 of 'net_cpu' answers wrongly: it reaches"):
        switch(newer, repository, server)
    assert (named(repository), server.loaded) == (1, {"net_cpu": 1})
    assert sorted(path.name for path in (repository / "net_cpu").iterdir()) == ["1", "config.pbtxt"]


def test_the_limit_on_golden_images(package):
    """The oracle: the mean over images of 10 log10(signal / noise), against what the package's own outputs reach."""
    with np.load(package / "golden.npz") as golden:
        exact, simulated = golden["float_output"].astype(np.float64), golden["simulated_output"]
    error = simulated - exact
    recorded = np.mean(10 * np.log10((exact**2).sum(1) / (error**2).sum(1)))
    for loss, passes in ((2.9, True), (3.1, False)):
        answers = (exact + error * 10 ** (loss / 20)).astype(np.float32)
        reason = golden_fault(package, lambda _, answers=answers: {"output": answers}, engine=False)
        assert (reason is None) == passes
    assert f"expected {recorded - 3:.1f} dB" in reason
    assert golden_fault(package, lambda _: {"output": simulated[:, :9]}, engine=False) == (
        f"it returns output ({len(exact)}, 9) to the golden samples"
    )


def test_a_package_that_clients_would_misuse_is_refused(repository, server, package, changed, detector):
    other = json.loads((package / "manifest.json").read_text())["preprocessing"] | {"mean": [0.4, 0.5, 0.5]}
    for folder in (changed(package, preprocessing=other), detector):
        with pytest.raises(UserError, match="has other tensors, batches or preprocessing than 'net_cpu'"):
            switch(folder, repository, server)
    assert sorted(path.name for path in (repository / "net_cpu").iterdir()) == ["1", "config.pbtxt"]


def test_another_name_or_a_damaged_repository_is_named(repository, server, package):
    with pytest.raises(UserError, match="holds no model 'other'"):
        activate([shipped_from_package(package)], repository, server, "other", Allowed())
    (repository / "net_cpu/config.pbtxt").write_text("nonsense {")
    with pytest.raises(UserError, match=r"config.pbtxt' is no configuration of this tool"):
        switch(package, repository, server)


def test_a_server_that_does_not_answer_is_named_before_anything_is_written(repository, newer):
    with pytest.raises(UserError, match=r"no Triton server answers at '127\.0\.0\.1:1' \(.*\): expected the host:port"):
        switch(newer, repository, Client("127.0.0.1:1"))
    assert sorted(path.name for path in (repository / "net_cpu").iterdir()) == ["1", "config.pbtxt"]


def test_two_runs_at_once_are_refused(repository, server, newer):
    with locked(repository / module.LOCK), pytest.raises(UserError, match="another run switches versions"):
        switch(newer, repository, server)


def killed_at(step, repository, newer):
    """Run a switch in a process that dies at its step number `step`; whether it died."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] != 0
    left = [step]

    def dying(call):
        def counted(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
            return call(*args, **kwargs)

        return counted

    for owner, names in ((Path, ("mkdir", "rename", "replace")), (shutil, ("rmtree", "copyfile")), (os, ("fsync",))):
        for name in names:
            setattr(owner, name, dying(getattr(owner, name)))
    StandIn.load = dying(StandIn.load)
    # ONNX Runtime's threads do not live on in a forked process: the golden outputs themselves are the answer
    golden = np.load(newer / "golden.npz")["simulated_output"]
    StandIn.answer = dying(lambda *_: {"output": golden})
    switch(newer, repository, StandIn(repository))
    os._exit(0)


def test_a_kill_at_any_step_leaves_a_version_that_serves(package, newer, tmp_path):
    step = 0
    while True:
        repository = tmp_path / f"models-{step}"
        write_repository([shipped_from_package(package)], repository, "net", Allowed())
        died = killed_at(step, repository, newer)
        version = named(repository)
        assert whole(repository / "net_cpu" / str(version))
        assert version == (1 if died else 2)  # it is named last, when it has been asked
        if not died:
            break
        server = StandIn(repository)
        server.load("net_cpu")
        assert switch(newer, repository, server) == {"net_cpu": (version, version + 1)}
        names = {path.name for path in (repository / "net_cpu").iterdir()}
        assert names == {*map(str, range(1, version + 2)), "config.pbtxt"}
        shutil.rmtree(repository)
        step += 1
    assert step > 12  # folders, copies, the rename, the load, the question, the switch
