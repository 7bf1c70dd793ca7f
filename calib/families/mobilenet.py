"""MobileNet-v2, MnasNet and relatives built by timm's EfficientNet class: inverted residuals."""

from calib.families import Family
from calib.structure.moves import Act

FAMILY = Family(
    name="mobilenet",
    networks=frozenset({"EfficientNet"}),
    modules=frozenset(
        {
            "DepthwiseSeparableConv", "InvertedResidual", "ConvBnAct", "SqueezeExcite", "Conv2d", "BatchNorm2d",
            "BatchNormAct2d", "ReLU", "ReLU6", "SiLU", "Sigmoid", "Linear", "SelectAdaptivePool2d",
            "AdaptiveAvgPool2d", "FastAdaptiveAvgPool2d", "Flatten", "Identity", "Sequential", "DropPath",
        }
    ),
    block=r"blocks\.\d+\.\d+",
    float_layers=(
        (r"conv_stem", "the first layer: 3 input channels are too few for INT8, and its error reaches every layer"),
        (r"classifier", "the last layer: <1 % of the time, and its error goes straight into the logits"),
        (r".*\.se\.conv_(reduce|expand)", "squeeze-excite works on one pixel: INT8 saves no time, and gates need precision"),
    ),
    percentile=99.99,  # rare outliers would make the scale too large for all others (MobileNet-v2 loses 3 dB at 99.9999)
    moves=(
        Act("EfficientNet", "conv_stem", "blocks.0.0.conv_dw", "bn1"),
        Act("DepthwiseSeparableConv", "conv_dw", "conv_pw", "bn1", gate="se"),
        Act("InvertedResidual", "conv_pw", "conv_dw", "bn1"),
        Act("InvertedResidual", "conv_dw", "conv_pwl", "bn2", gate="se"),
    ),
)  # fmt: skip
