"""Yahoo's open_nsfw (BSD-2): a content-safety classifier, a ResNet-50 of half width as Caffe builds it.

The zoo has it as a real bottleneck ResNet whose weights a package index serves. Its classifier has two classes, of which
photographs fill one: agreement would stand near 100 % whatever the quantization does. So the network ends in its pooled
features, 1024 values, which show every error.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

# The file reads 8-bit BGR less a mean. Its first convolution is turned to RGB, and a std of 1/255 takes back the scaling to
# 0..1. Yahoo's code resizes both edges to 256 and crops.
IMAGES: dict[str, Any] = {
    "input_size": (3, 224, 224), "interpolation": "bilinear", "crop_pct": 0.875, "crop_mode": "squash",
    "mean": (123 / 255, 117 / 255, 104 / 255), "std": (1 / 255, 1 / 255, 1 / 255), "classifier": "fc",
}  # fmt: skip


def resnet50_thin() -> "nn.Module":
    """timm's ResNet-50 with the differences of Caffe's: its strides, its max-pool, and BatchNorm folded into biases."""
    import timm
    import torch
    from torch import nn

    half: Any = {"channels": (32, 64, 128, 256), "num_classes": 0, "norm_layer": nn.Identity}
    net: Any = timm.create_model("resnet50", pretrained=False, **half)
    net.maxpool = nn.MaxPool2d(3, 2, ceil_mode=True)  # pads on the right and below only
    for block in (net.layer2[0], net.layer3[0], net.layer4[0]):
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    for conv in _convs(net):
        conv.bias = nn.Parameter(torch.zeros(conv.out_channels))
    net.pretrained_cfg = IMAGES
    return net


def _convs(net: Any) -> Iterator["nn.Conv2d"]:
    """The convolutions of the network in the order of the ONNX file: the shortcut before its block."""
    yield net.conv1
    for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
        for block in layer:
            if block.downsample is not None:
                yield block.downsample[0]
            yield from (block.conv1, block.conv2, block.conv3)


def open_nsfw_from_onnx(blob: bytes, net: "nn.Module") -> "dict[str, Tensor]":
    """The state dict of `resnet50_thin`, read from the ONNX file of the wheel."""
    import onnx
    import torch

    graph = onnx.load_from_string(blob).graph
    tensors = {init.name: torch.from_numpy(onnx.numpy_helper.to_array(init).copy()) for init in graph.initializer}
    names = {module: name for name, module in net.named_modules()}
    state = {}
    for conv, node in zip(_convs(net), (node for node in graph.node if node.op_type == "Conv"), strict=True):
        for kind, tensor in zip(("weight", "bias"), node.input[1:], strict=True):
            state[f"{names[conv]}.{kind}"] = tensors[tensor]
    return state | {"conv1.weight": state["conv1.weight"].flip(1)}  # BGR to RGB
