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
        (r"conv1(\.\d+)?", "the stem: 3 input channels are too few for an INT8 kernel, and the error enters all"),
        (r"fc", "the classifier: <1 % of the time, its error goes straight into the logits"),
    ),
    percentile=99.99,  # as MobileNet
    moves=(
        Act("BasicBlock", "conv1", "conv2", "act1"),
        Act("Bottleneck", "conv1", "conv2", "act1"),
        Act("Bottleneck", "conv2", "conv3", "act2"),
    ),
)  # fmt: skip
