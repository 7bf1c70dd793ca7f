"""The command that a report records gives the options it was made with. Oracle: the parser of the command line."""

import shlex

import pytest

from deploy import cli, pipeline
from deploy.engine.build import Profile
from deploy.engine.builder import Builder
from deploy.options import Options

GIVEN = {
    "model": "vit_b", "input_size": (224, 280), "weights": "a b.pth", "calib": "/my images", "evaluation": "$(x)",
    "calib_images": 7, "recipe": "mine.toml", "target": "tensorrt_rtx", "sms": (86, 120), "profile": Profile(2, 16),
    "builder": Builder(5, 0, "ampere+"), "floats": "fp32",
    "device": "cpu", "seed": 3, "max_extra_kernels": 0, "max_extra_bytes": 9,
}  # fmt: skip


def parsed(command, monkeypatch):
    """The options that the command line makes of a command."""
    found = []
    monkeypatch.setattr(pipeline, "engine", lambda options: found.append(options) or "stopped")
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "deploy"]
    assert cli.main(words[3:]) == 0
    return found[0]


@pytest.mark.parametrize("options", [{}, GIVEN, *({name: value} for name, value in GIVEN.items())], ids=str)
def test_the_command_gives_the_same_options(options, monkeypatch):
    wanted = Options(**options)
    assert parsed(wanted.command(), monkeypatch) == wanted


def test_a_network_of_ones_own_takes_the_place_of_the_model(monkeypatch):
    wanted = Options(module="mine.py:build")
    assert "--model" not in wanted.command()
    assert parsed(wanted.command(), monkeypatch).module == "mine.py:build"


def test_what_decides_nothing_is_left_out():
    plain = Options(model="vit_b", out="elsewhere", cache=False, begin="fold")
    assert plain.command() == "python -m deploy engine --model vit_b --recipe int8"
