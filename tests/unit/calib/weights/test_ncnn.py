"""ncnn's files are read as they were written, and refused where they hold more or less."""

import numpy as np
import pytest
import torch

from calib.weights.ncnn import FLOAT16_WEIGHTS, weights_from_ncnn
from calib.weights.super_resolution import SRVGG, RRDBNet

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
