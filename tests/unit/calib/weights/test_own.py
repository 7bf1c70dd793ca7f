"""Networks of the user's own."""

import pytest
import torch
from torch import nn

from calib.errors import UserError
from calib.weights.load import load_net
from calib.weights.own import build, name_of
from calib.weights.zoo import input_size, own_model, resolve_model

FILE = """
import torch
from torch import nn
from helper import WIDTH

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, WIDTH, 3, 2), nn.Linear(WIDTH, 5)
    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))

def make():
    return Net()

ready = Net()
number = 3

def number_maker():
    return 4

def broken():
    raise KeyError("depth")
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "mynet.py").write_text(FILE)
    (tmp_path / "helper.py").write_text("WIDTH = 16")
    return tmp_path / "mynet.py"


@pytest.mark.parametrize("attribute", ["make", "Net", "ready"])
def test_a_function_a_class_or_a_module_in_a_file_gives_the_network(file, attribute):
    net = build(f"{file}:{attribute}")
    assert net(torch.zeros(2, 3, 8, 8)).shape == (2, 5)
    assert not net.training


def test_a_module_of_a_package_gives_the_network():
    assert isinstance(build("torch.nn:Identity"), nn.Identity)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("{file}:absent", "has no 'absent'"),
        ("{file}:number", "failed with TypeError"),
        ("{file}:number_maker", "gives a int: expected a torch.nn.Module"),
        ("{file}:broken", "failed with KeyError: 'depth'"),
        ("/nowhere/net.py:make", "'/nowhere/net.py' does not exist"),
        ("no_such_package:make", "failed with ModuleNotFoundError"),
        ("mynet.py", "expected package.module:factory"),
        ("mynet.py:", "expected package.module:factory"),
        (":make", "expected package.module:factory"),
    ],
)
def test_what_gives_no_network_is_refused_in_one_line(file, factory, message):
    with pytest.raises(UserError, match=message) as caught:
        build(factory.format(file=file))
    assert "\n" not in str(caught.value)


def test_the_name_is_that_of_the_file_and_the_factory():
    assert name_of("nets/mynet.py:make") == "mynet.make"
    assert name_of("package.models:make") == "models.make"


def test_a_checkpoint_is_loaded_and_the_normalisation_that_was_assumed_is_said(file, tmp_path):
    from dataclasses import replace

    spec = replace(own_model(f"{file}:make"), img_size=(12, 20))
    torch.save({"model_state_dict": {f"module.{k}": v + 1 for k, v in build(spec.factory).state_dict().items()}},
               tmp_path / "trained.tar")  # fmt: skip
    loaded = load_net(spec, str(tmp_path / "trained.tar"))
    assert float(loaded.net.conv.weight.detach().mean()) > 0.5
    assert loaded.data_config["input_size"] == (3, 12, 20)
    assert "ImageNet's mean and std" in loaded.warnings[0]
    assert load_net(spec).source == f"as {spec.factory} built it"
    assert (
        load_net(spec, "random", 3).sha256 == load_net(spec, "random", 3).sha256 != load_net(spec, "random", 4).sha256
    )


def test_a_network_that_does_not_say_its_size_needs_one(file):
    with pytest.raises(UserError, match="give INPUT="):
        load_net(own_model(f"{file}:make"))


@pytest.mark.parametrize(
    ("text", "size"), [("384", (384, 384)), ("364x490", (364, 490)), ("3x64x32", (64, 32)), ("3X8x9", (8, 9))]
)
def test_sizes(text, size):
    assert input_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "0", "1x64x64", "3x4x5x6", "64,64", "-3", "a"])
def test_other_sizes_are_refused(text):
    with pytest.raises(UserError, match="INPUT="):
        input_size(text)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_timm_networks_take_another_size(name):
    from dataclasses import replace

    loaded = load_net(replace(resolve_model(name), img_size=(96, 128)), "random")
    assert loaded.data_config["input_size"] == (3, 96, 128)
    assert loaded.net(torch.zeros(1, 3, 96, 128)).shape == (1, 1000)
