"""A network whose values FP16 cannot hold gets an engine of INT8 beside FP32."""

import json

import pytest

from deploy import cli
from deploy.verify import verify_package

pytestmark = pytest.mark.slow

pytest.importorskip("tensorrt_rtx")

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 16, 3, stride=2), nn.Conv2d(16, 32, 3, stride=2)
        self.third, self.head = nn.Conv2d(32, 32, 3), nn.Linear(32, 10)
        self.large = nn.Buffer(torch.tensor(3e5))

    def forward(self, x):
        x = self.second(self.first(x).relu()).relu()
        x = (x * self.large).sqrt() / self.large.sqrt()
        return self.head(self.third(x).relu().mean((2, 3)))


def build():
    return Net().eval()
"""


def test_it_is_refused_in_fp16_and_built_with_fp32_types(tmp_path, capsys):
    (tmp_path / "net.py").write_text(NET)
    command = [
        "engine", "--module", f"{tmp_path / 'net.py'}:build", "--weights", "random", "--input", "32", "--recipe",
        "int8_plain", "--calib-images", "16", "--target", "tensorrt_rtx", "--sm", "89", "--batch", "2", "--max-batch", "4",
        "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    assert cli.main(command) == 2
    assert "'large' holds 3e+05, beyond FP16's 65504" in (said := capsys.readouterr().err)
    assert "give FLOAT=fp32" in said
    assert cli.main([*command, "--float", "fp32"]) == 0
    out = capsys.readouterr().out
    assert "types beside INT8" in out
    assert "warning: FP32 types beside INT8 (FLOAT=fp32)" in out
    (found,) = (tmp_path / "out").rglob("manifest.json")
    manifest, report = (json.loads((found.parent / f"{name}.json").read_text()) for name in ("manifest", "report"))
    assert verify_package(found.parent) == []
    assert (manifest["floats"], report["floats"]) == ("fp32", "fp32")
    assert [each["dtype"] for kind in ("inputs", "outputs") for each in manifest["io"][kind]] == ["float32"] * 2
    assert (report["engine"]["planned"], report["engine"]["int8_convs"], report["engine"]["lost"]) == (2, 2, [])
    assert report["engine"]["fp16_convs"] == report["engine"]["fp16_gemms"] == 0
    assert report["fidelity"]["sqnr_db"] > 20
    assert "--float fp32" in report["command"]

    again = tmp_path / "again"
    assert cli.main(["rebuild", str(found.parent), "--target", "tensorrt_rtx", "--sm", "89", "--to", str(again)]) == 0
    kernels = [json.loads((folder / "kernels.json").read_text())["int8"] for folder in (again, found.parent)]
    assert kernels[0] == kernels[1]  # the engine itself differs in some bytes from one build to the next
    assert json.loads((again / "manifest.json").read_text())["io"] == manifest["io"]
    assert cli.main(["report", str(again)]) == 0
