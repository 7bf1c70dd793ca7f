"""ResNet and ResNeXt."""

from calib.families import Family
from calib.structure.moves import Act

FAMILY = Family(
    name="resnet",
    networks=frozenset({"ResNet"}),
    modules=frozenset(
        {
            "BasicBlock", "Bottleneck", "Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d", "AvgPool2d", "Linear",
            "SelectAdaptivePool2d", "AdaptiveAvgPool2d", "FastAdaptiveAvgPool2d", "Flatten", "Identity", "Sequential",
        }
    ),
    block=r"layer\d\.\d+",
    float_layers=(
        (r"conv1(\.\d+)?", "the first layer: 3 input channels are too few for INT8, and its error reaches every layer"),
        (r"fc", "the last layer: <1 % of the time, and its error goes straight into the logits"),
    ),
    percentile=99.99,  # as MobileNet
    moves=(
        Act("BasicBlock", "conv1", "conv2", "act1"),
        Act("Bottleneck", "conv1", "conv2", "act1"),
        Act("Bottleneck", "conv2", "conv3", "act2"),
    ),
)  # fmt: skip
