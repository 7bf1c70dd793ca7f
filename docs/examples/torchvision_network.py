"""A network of torchvision that timm has in another form: MODULE=docs/examples/torchvision_network.py:build."""

from torch import nn
from torchvision.models import mobilenet_v3_small


def build() -> nn.Module:
    """Build it; WEIGHTS= takes what torchvision saved for it."""
    net = mobilenet_v3_small(num_classes=1000)
    net.num_classes = 1000  # so many outputs are logits of classes
    net.pretrained_cfg = {
        "input_size": (3, 224, 224), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
        "interpolation": "bilinear", "crop_pct": 0.875, "crop_mode": "center",
    }  # fmt: skip
    return net
