"""RegNetX and RegNetY."""

from calib.families import Family
from calib.structure.moves import Act

FAMILY = Family(
    name="regnet",
    networks=frozenset({"RegNet"}),
    modules=frozenset(
        {
            "RegStage", "Bottleneck", "ConvNormAct", "SEModule", "Conv2d", "BatchNorm2d", "BatchNormAct2d", "ReLU",
            "Sigmoid", "Linear", "ClassifierHead", "SelectAdaptivePool2d", "AdaptiveAvgPool2d",
            "FastAdaptiveAvgPool2d", "Flatten", "Identity", "Sequential", "Dropout",
        }
    ),
    block=r"s\d\.b\d+",
    float_layers=(
        (r"stem\.conv", "the first layer: 3 input channels are too few for INT8, and its error reaches every layer"),
        (r"head\.fc", "the last layer: <1 % of the time, and its error goes straight into the logits"),
        (r".*\.se\.fc\d", "squeeze-excite works on one pixel: INT8 saves no time, and gates need precision"),
    ),
    percentile=99.99,  # as MobileNet
    moves=(
        Act("Bottleneck", "conv1.conv", "conv2.conv", "bn"),
        Act("Bottleneck", "conv2.conv", "conv3.conv", "bn", gate="se"),
    ),
)  # fmt: skip
