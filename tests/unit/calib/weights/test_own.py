"""Networks of the user's own."""

import copy
import dataclasses
import sys

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
        ("net.onnx", "This is an ONNX graph: a network is .* WEIGHTS= takes the checkpoint it was exported from"),
        ("/x/net.onnx:make", "This is an ONNX graph"),
        ("last.pth:net", "This is a checkpoint of weights: .* WEIGHTS= takes it"),
        ("model.engine", "This is a TensorRT engine"),
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
    assert "assumed interpolation bicubic, mean (0.485, 0.456, 0.406), std (0.229" in loaded.warnings[0]
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


@pytest.mark.parametrize("name", ["net.onnx", "/x/last.pth", "nets/model.engine"])
def test_a_file_in_the_place_of_a_name_is_told_where_it_belongs(name):
    with pytest.raises(UserError, match=r"MODULE=.*WEIGHTS= takes"):
        resolve_model(name)


def described(tmp_path, cfg):
    (tmp_path / "described.py").write_text(
        f"{FILE.replace('from helper import WIDTH', 'WIDTH = 16')}\nNet.pretrained_cfg = {cfg}\n"
    )
    return own_model(f"{tmp_path}/described.py:make")


WHOLE = {
    "input_size": (3, 24, 24), "interpolation": "bilinear", "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2),
    "crop_pct": 0.9, "crop_mode": "squash",
}  # fmt: skip


def test_what_a_network_says_of_its_images_is_used(tmp_path):
    loaded = load_net(described(tmp_path, WHOLE))
    assert loaded.data_config == WHOLE
    assert not any("assumed" in line for line in loaded.warnings)


@pytest.mark.parametrize("missing", ["mean", "std", "interpolation", "crop_pct", "crop_mode"])
def test_what_a_network_does_not_say_of_its_images_is_assumed_and_named(tmp_path, missing):
    loaded = load_net(described(tmp_path, {key: value for key, value in WHOLE.items() if key != missing}))
    assert f"assumed {missing} {loaded.data_config[missing]} (" in loaded.warnings[0]
    assert loaded.data_config["input_size"] == (3, 24, 24)


@pytest.mark.parametrize("change", [{"mean": 0.5}, {"std": (0.2,)}, {"mean": "imagenet"}, {"input_size": 224}])
def test_numbers_of_images_that_are_none_are_refused(tmp_path, change):
    with pytest.raises(UserError, match=f"pretrained_cfg has {next(iter(change))} = .* expected three numbers"):
        load_net(described(tmp_path, WHOLE | change))


def test_a_partial_description_without_a_size_needs_one(tmp_path):
    with pytest.raises(UserError, match="give INPUT="):
        load_net(described(tmp_path, {"mean": (0.5, 0.5, 0.5)}))


def test_the_file_of_a_factory_is_identified(file):
    import hashlib
    from dataclasses import replace

    module = load_net(replace(own_model(f"{file}:make"), img_size=(12, 12))).module
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert module == {"factory": f"{file}:make", "file": str(file), "sha256": digest}
    assert load_net(resolve_model("test_vit"), "random").module is None
    installed = load_net(replace(own_model("timm.models:test_resnet"), img_size=(32, 32))).module
    assert installed["file"].endswith("timm/models/__init__.py")


@dataclasses.dataclass
class Heads:
    features: torch.Tensor
    logits: torch.Tensor


OLD_NORMS = """
import torch
from torch import nn
from torch.nn.utils import prune, spectral_norm, weight_norm

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = weight_norm(nn.Conv2d(3, 8, 3))
        self.mix, self.head = spectral_norm(nn.Conv2d(8, 8, 1)), prune.l1_unstructured(nn.Linear(8, 5), "weight", 0.5)
    def forward(self, x):
        return self.head(self.mix(self.conv(x)).mean((2, 3)))
"""


def test_weights_that_hooks_compute_before_every_run_are_set_once(tmp_path):
    (tmp_path / "net.py").write_text(OLD_NORMS)
    factory, images = f"{tmp_path}/net.py:Net", torch.rand(2, 3, 8, 8)
    torch.manual_seed(0)
    exact = build(factory)
    with torch.no_grad():
        expected = exact(images)
    torch.save(exact.state_dict(), tmp_path / "weights.pt")
    net = load_net(dataclasses.replace(own_model(factory), img_size=(8, 8)), str(tmp_path / "weights.pt")).net
    assert torch.allclose(copy.deepcopy(net)(images), expected, atol=1e-6)
    assert not net.conv._forward_pre_hooks
    assert (net.head.weight == 0).sum() == 20
    assert {"conv.weight", "mix.weight", "head.weight"} <= {name for name, _ in net.named_parameters()}


LOCKED = """
import threading
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3))
        self.lock = threading.Lock()

class Numbered(nn.Module):
    def __init__(self):
        super().__init__()
        self.add_module("conv@1", nn.Conv2d(3, 8, 3))
"""


@pytest.mark.parametrize(
    ("factory", "message"), [("Net", "Net cannot be copied .TypeError"), ("Numbered", "a module is called 'conv@1'")]
)
def test_networks_that_no_step_could_take_are_refused_when_they_are_loaded(tmp_path, factory, message):
    (tmp_path / "net.py").write_text(LOCKED)
    with pytest.raises(UserError, match=message):
        load_net(dataclasses.replace(own_model(f"{tmp_path}/net.py:{factory}"), img_size=(8, 8)))


ODD = """
import sys
import torch
from torch import nn

class Net(nn.Module):
    num_classes = 5
    def __init__(self, last=None):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), last or nn.Linear(8, 5)
    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))

def lazy():
    return Net(nn.LazyLinear(5))

def meta():
    with torch.device("meta"):
        return Net()

def quantized():
    return torch.ao.quantization.quantize_dynamic(Net(), {nn.Linear})

def scripted():
    return torch.jit.script(Net())

def compiled():
    return torch.compile(Net())

def ends():
    sys.exit("done")
"""


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("lazy", "'head.weight' of Net has no shape yet: run the network once"),
        ("meta", "'conv.weight' of Net is on the device meta"),
        ("quantized", "of Net is a .* of a quantized layer: give the float network"),
        ("scripted", "gives a TorchScript module: expected the nn.Module"),
        ("ends", r"ended the process .SystemExit: done.: expected a file that can be imported"),
    ],
)
def test_odd_networks_are_refused_in_one_line(tmp_path, factory, message):
    (tmp_path / "net.py").write_text(ODD)
    with pytest.raises(UserError, match=message):
        load_net(dataclasses.replace(own_model(f"{tmp_path}/net.py:{factory}"), img_size=(8, 8)))


def test_what_torch_compile_wraps_is_taken(tmp_path):
    (tmp_path / "net.py").write_text(ODD)
    assert type(build(f"{tmp_path}/net.py:compiled")).__name__ == "Net"


@pytest.mark.parametrize("name", ["json", "onnx", "calib"])
def test_a_file_takes_the_place_of_no_installed_module(tmp_path, name):
    (tmp_path / f"{name}.py").write_text(ODD)
    before = sys.modules.get(name)
    assert type(build(f"{tmp_path}/{name}.py:Net")).__name__ == "Net"
    assert sys.modules.get(name) is before
