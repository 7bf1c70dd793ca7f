"""The whole pipeline on a network that takes seconds: files, branding, interruption, replacement."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from deploy import cli
from deploy.package import FILES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
pytest.importorskip("tensorrt_rtx")

COMMON = ["--model", "test_vit", "--calib-images", "16", "--sm", "89", "--cache", "off"]


def photographs(folder: Path, count: int) -> Path:
    """A folder of noisy pictures, some of them broken or of unusual kinds."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(count):
        Image.fromarray(generator.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / f"{index:03}.png")
    Image.fromarray(generator.integers(0, 256, (40, 50), np.uint8)).save(folder / "grey.jpg")
    Image.fromarray(generator.integers(0, 256, (40, 50, 4), np.uint8), "CMYK").save(folder / "cmyk.jpg")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "test_vit.safetensors"
    import torch

    torch.manual_seed(0)
    save_file({name: value.contiguous() for name, value in timm.create_model("test_vit").state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The user's cache during the tests of this file."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def command(tmp_path_factory, checkpoint, cache) -> list[str]:
    """A run on the user's own weights and images, with the cache on and empty."""
    assert not list(cache.iterdir())
    images = photographs(tmp_path_factory.mktemp("calib") / "images", 30)
    return ["engine", *COMMON, "--cache", "on", "--weights", str(checkpoint), "--calib", str(images)]


@pytest.fixture(scope="module")
def package(tmp_path_factory, command):
    """The package of that run."""
    folder = tmp_path_factory.mktemp("run")
    assert cli.main([*command, "--out", str(folder / "out")]) == 0
    return folder / "out" / "test_vit" / "int8"


def test_a_package_holds_exactly_its_files(package):
    assert sorted(path.name for path in package.iterdir()) == sorted(FILES)
    assert [path.name for path in package.parent.iterdir()] == ["int8"]


def test_the_report_has_every_figure(package):
    report = json.loads((package / "report.json").read_text())
    assert {"sqnr_db", "cosine", "top1_agreement"} <= report["fidelity"].keys()
    assert {"source", "count", "sha256"} <= report["calibration"].keys()
    assert {
        "backend", "version", "targets", "bytes", "int8_gemms", "fp16_gemms", "fp32_gemms", "int8_attention",
        "fused_attention", "kernels",
    } <= report["engine"].keys()  # fmt: skip
    assert report["parity"]["torch_vs_ort_rel_l2"] < 1e-3
    assert report["speed"]["ort_cpu_ratio"] > 0
    assert report["engine"]["bytes"] == (package / "model.engine").stat().st_size
    assert report["engine"]["targets"] == ["SM89"]
    assert report["peak_rss_mb"] > 100
    assert set(report["seconds"]) >= {"load", "calibrate", "export", "build", "verify", "total"}
    assert report["calibration"]["count"] == 16
    assert len([stage for stage in report["history"] if stage["stage"] == "calibrate"]) == 1


def test_the_report_says_how_far_fp16_and_the_calibration_set_reach(package):
    report = json.loads((package / "report.json").read_text())
    assert report["fp16_range"]["images"] == 16
    assert report["fp16_range"]["headroom"] == pytest.approx(65504 / report["fp16_range"]["largest"], abs=1e-3)
    assert report["coverage"]["spread"]["median"] >= 1
    assert report["coverage"]["images"] == report["evaluation"]["count"]
    assert len(report["coverage"]["outside"]) == 3


def kept(cache: Path) -> dict[str, Path]:
    """Stage -> its only state."""
    files = list((cache / "int8-engine/stages").iterdir())
    found = {file.name.partition(".")[0]: file for file in files}
    assert len(found) == len(files)
    return found


def test_the_same_run_again_takes_its_decisions_from_the_cache_and_gives_the_same_graphs(
    package, command, cache, tmp_path, capsys
):
    keys = {stage: file.name.split(".")[1] for stage, file in kept(cache).items()}
    assert list(sorted(keys)) == ["calibrate", "equalise", "keep_float", "rtn"]
    assert cli.main([*command, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().err
    again = tmp_path / "test_vit" / "int8"
    for name in ("model.onnx", "model.fp32.onnx", "model.engine", "kernels.json"):
        assert (again / name).read_bytes() == (package / name).read_bytes()
    report, manifest = (json.loads((again / name).read_text()) for name in ("report.json", "manifest.json"))
    for stage, key in keys.items():
        said = f"taken from cache {key[:12]}"
        assert said in shown
        assert [each["stage"] for each in report["history"] if said in each["notes"]] == [stage]
    assert manifest["calibration_cache"] == keys["calibrate"]
    engines = [file.name.split(".")[1] for file in (cache / "int8-engine/engines").iterdir()]
    assert len(engines) == 2  # and its FP16 twin
    assert manifest["engine_cache"] in engines
    assert f"taken from cache {manifest['engine_cache'][:12]}" in shown
    first = json.loads((package / "manifest.json").read_text())
    assert (first["calibration_cache"], first["engine_cache"]) == (None, None)


def stopped(*_args):
    raise ZeroDivisionError


@pytest.mark.usefixtures("package")
def test_another_seed_is_not_taken_from_the_cache(command, tmp_path, monkeypatch):
    monkeypatch.setattr("deploy.stages.equalise", stopped)
    with pytest.raises(ZeroDivisionError):
        cli.main([*command, "--out", str(tmp_path), "--seed", "1"])


def stages_of(err: str) -> list[str]:
    """The stages that have run, in order."""
    return [line.split()[0] for line in err.splitlines() if re.match(r"  [a-z]+ +[0-9.]+ s  ", line)]


def test_a_run_stops_where_it_is_told_and_another_goes_on_to_the_same_graphs(
    package, command, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = [*command, "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--until", "calibrate"]) == 0
    shown = capsys.readouterr()
    assert stages_of(shown.err) == ["load", "images", "fold", "equalise", "calibrate"]
    assert shown.out == (
        f"stopped after 'calibrate': nothing was written to {tmp_path / 'out'}; go on with --from 'range' (FROM='range')\n"
    )
    assert not (tmp_path / "out").exists()
    states = kept(tmp_path / "cache")
    assert states.keys() == {"equalise", "calibrate"}
    monkeypatch.setattr("deploy.stages.equalise", stopped)
    monkeypatch.setattr("deploy.stages.calibrate", stopped)
    assert cli.main([*command, "--from", "rtn", "--until", "rtn"]) == 0
    assert stages_of(capsys.readouterr().err) == ["load", "images", "fold", "equalise", "calibrate", "rtn"]
    assert cli.main([*command, "--from", "range"]) == 0
    assert (tmp_path / "out/test_vit/int8/model.onnx").read_bytes() == (package / "model.onnx").read_bytes()


@pytest.mark.usefixtures("package")
def test_what_lies_before_from_is_never_computed_and_the_missing_state_is_named(
    command, cache, tmp_path, capsys, monkeypatch
):
    for stage in ("equalise", "calibrate"):
        monkeypatch.setattr(f"deploy.stages.{stage}", stopped)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(cache, tmp_path / "cache")
    kept(tmp_path / "cache")["calibrate"].unlink()
    command = [*command, "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--from", "export"]) == cli.EXIT_USER_ERROR
    assert re.search(
        r"error: --from 'export' needs what 'calibrate' decided: nothing kept for exactly this input "
        r"\([0-9a-f]{12}\); run without --from first$",
        capsys.readouterr().err.strip(),
    )
    with pytest.raises(ZeroDivisionError):
        cli.main([*command, "--from", "equalise"])
    assert not list(tmp_path.rglob("*.onnx"))


def test_a_network_that_does_not_fit_fp16_is_one_line(tmp_path, monkeypatch, capsys):
    import torch

    from calib.weights import load as weights

    def load_large(*args):
        loaded = weights.load_net(*args)
        with torch.no_grad():
            loaded.net.blocks[1].mlp.fc2.bias.fill_(65000.0)
            loaded.net.blocks[0].mlp.fc2.bias.fill_(65000.0)
        return loaded

    monkeypatch.setattr("deploy.steps.load_net", load_large)
    code = cli.main(["engine", *COMMON, "--weights", "random", "--out", str(tmp_path / "out")])
    assert code == cli.EXIT_USER_ERROR
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: 'blocks.1' reaches 1.3e+05 on 16 calibration images, beyond FP16's 65504")
    assert not list(tmp_path.rglob("*.onnx"))


def test_small_and_broken_calibration_sets_are_said(package):
    warnings = " ".join(json.loads((package / "report.json").read_text())["warnings"])
    assert "only 16 calibration images" in warnings
    assert "sample calibration" not in warnings


def test_the_manifest_proves_what_the_files_are(package):
    manifest = json.loads((package / "manifest.json").read_text())
    assert set(manifest["files"]) == set(FILES) - {"manifest.json"}
    assert manifest["servable"]
    assert manifest["weights"]["sha256"]
    assert manifest["preprocessing"]["height"] == 160
    assert len(manifest["planned_int8_layers"]) == manifest["engine"]["audit"]["planned"] > 0


def test_page_and_card_of_a_package_are_written_without_torch(package, command, tmp_path):
    copied = shutil.copytree(package, tmp_path / "int8")
    script = (
        "import sys; sys.modules.update(torch=None, timm=None)\n"
        "from deploy.cli import main; sys.exit(main(['report', sys.argv[1]]))"
    )
    done = subprocess.run([sys.executable, "-c", script, copied], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page, card = ((tmp_path / f"int8.{name}").read_text() for name in ("report.html", "MODEL_CARD.md"))
    report = json.loads((package / "report.json").read_text())
    for text in (page, card):
        assert f"{report['fidelity']['sqnr_db']:.1f} dB" in text
        assert f"--weights {command[command.index('--weights') + 1]}" in text
    assert "The most sensitive layers" in page


def test_verify_accepts_a_sound_package_without_torch(package):
    script = (
        "import sys; sys.modules.update(torch=None, timm=None)\n"
        "from deploy.cli import main; sys.exit(main(['verify', sys.argv[1]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, package], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "golden outputs reproduced" in done.stdout


@pytest.mark.parametrize("file", ["model.engine", "model.fp32.onnx"])
def test_verify_names_a_changed_or_missing_file(package, tmp_path, capsys, file):
    copy = tmp_path / "copy"
    shutil.copytree(package, copy)
    content = bytearray((copy / file).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / file).write_bytes(content)
    assert cli.main(["verify", str(copy)]) == cli.EXIT_FAILED
    assert f"{file} has changed" in capsys.readouterr().err
    (copy / file).unlink()
    assert cli.main(["verify", str(copy)]) == cli.EXIT_FAILED
    assert f"{file} is missing" in capsys.readouterr().err


def test_random_weights_and_sample_images_are_branded_everywhere(tmp_path, capsys):
    assert cli.main(["engine", *COMMON, "--weights", "random", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    folder = tmp_path / "test_vit-random-weights" / "int8"
    report, manifest = (json.loads((folder / name).read_text()) for name in ("report.json", "manifest.json"))
    for text in (shown.out, " ".join(report["warnings"]), " ".join(manifest["warnings"])):
        assert "RANDOM WEIGHTS" in text
        assert "sample calibration: not for production" in text
    assert "random" in shown.err.lower()
    assert not manifest["servable"]
    assert manifest["weights"]["random"]


def test_a_lost_int8_layer_fails_the_build_by_name_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    from dataclasses import replace

    from deploy.engine import audit

    def blind(kernels, planned, attention):
        return replace(audit.audit(kernels, planned, attention), lost=("blocks.1.mlp.fc1/MatMul",))

    monkeypatch.setattr("deploy.proven.audit", blind)
    code = cli.main(["engine", *COMMON, "--weights", "random", "--out", str(tmp_path / "out")])
    assert code == cli.EXIT_FAILED
    assert "blocks.1.mlp.fc1/MatMul" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(tmp_path.rglob("*.onnx"))


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(tmp_path):
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
    script = limit + "from deploy.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [
        sys.executable,
        "-c",
        script,
        "engine",
        *COMMON,
        "--weights",
        "random",
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == cli.EXIT_USER_ERROR, done.stderr
    assert "cannot be written" in done.stderr.strip().splitlines()[-1]
    assert not list(tmp_path.rglob("*.onnx"))


INTERRUPTIONS = [
    *((stage, signal.SIGINT) for stage in ("load", "calibrate", "export", "audit")),
    ("export", signal.SIGTERM),
]


@pytest.mark.parametrize(("stage", "number"), INTERRUPTIONS)
def test_interrupting_after_any_stage_leaves_nothing_and_keeps_the_old_package(tmp_path, package, stage, number):
    final = tmp_path / "test_vit-random-weights" / "int8"
    shutil.copytree(package, final)
    before = (final / "manifest.json").read_bytes()
    command = [
        sys.executable,
        "-m",
        "deploy",
        "engine",
        *COMMON,
        "--weights",
        "random",
        "--out",
        str(tmp_path),
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.split()[:1] == [stage]:
            process.send_signal(number)
            break
    rest = process.stderr.read()
    assert process.wait() == cli.EXIT_INTERRUPTED, rest
    assert rest.strip().splitlines()[-1].startswith("interrupted: no package was written")
    assert (final / "manifest.json").read_bytes() == before
    assert sorted(path.name for path in final.parent.iterdir()) == ["int8"]


def test_after_a_kill_the_next_run_makes_the_same_package(tmp_path, package, command):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy", *command, "--out", str(out)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.split()[:1] == ["build"]:
            process.kill()
            break
    process.stderr.read()
    assert process.wait() == -signal.SIGKILL
    assert not (out / "test_vit" / "int8").exists()
    assert cli.main([*command, "--out", str(out)]) == 0
    again = out / "test_vit" / "int8"
    assert [path.name for path in again.parent.iterdir()] == ["int8"]
    assert sorted(path.name for path in again.iterdir()) == sorted(FILES)
    for name in ("model.onnx", "model.fp32.onnx"):
        assert (again / name).read_bytes() == (package / name).read_bytes()
