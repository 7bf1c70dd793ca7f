"""RetinaNet (Lin et al., ICCV 2017) of torchvision, without what stays outside an engine: decoding and suppression of boxes.

The names of the weights are torchvision's: WEIGHTS= takes what torchvision saved, for any number of classes it was built
with (`retinanet_resnet50_fpn_coco-*.pth` has 91, COCO's ids). torchvision is BSD-3.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

SIDE = 640  # of the images that are read, in pixels, where INPUT= gives none
CLASSES = 91  # COCO's ids, as torchvision's checkpoints have them
STRIDES = (8, 16, 32, 64, 128)
RATIOS = (0.5, 1.0, 2.0)
# The whole image is stretched to the size of the input.
IMAGES: dict[str, Any] = {
    "input_size": (3, SIDE, SIDE), "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash",
    "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
}  # fmt: skip
# torchvision's checkpoints were trained with frozen BatchNorm without epsilon, and its own builders set it to 0 for them.
EPSILON = 0.0


def _sizes(side: int) -> tuple[int, ...]:
    """Three sizes of anchors on the level whose smallest is `side`, a third of an octave apart."""
    return side, int(side * 2 ** (1 / 3)), int(side * 2 ** (2 / 3))


def _backbone(kind: str, levels: int) -> nn.Module:
    """The network `kind` under a feature pyramid whose first level has stride 8, with two coarser levels added."""
    from torchvision.models import mobilenet_v2
    from torchvision.models.detection.backbone_utils import _mobilenet_extractor, resnet_fpn_backbone
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    extra = LastLevelP6P7(256, 256)
    if kind == "mobilenet_v2":
        net = mobilenet_v2(norm_layer=partial(nn.BatchNorm2d, eps=EPSILON))
        # the last features of strides 8, 16 and 32
        return _mobilenet_extractor(net, True, levels, returned_layers=[2, 3, 4], extra_blocks=extra)
    return resnet_fpn_backbone(
        backbone_name=kind, weights=None, norm_layer=partial(nn.BatchNorm2d, eps=EPSILON), trainable_layers=levels,
        returned_layers=[2, 3, 4], extra_blocks=extra,
    )  # fmt: skip


class RetinaNet(nn.Module):
    """Scores of classes and offsets from anchors on five levels. `boxes` tells how they become boxes (calib/task.py)."""

    def __init__(self, kind: str, classes: int = CLASSES) -> None:
        super().__init__()
        from torchvision.models.detection.retinanet import RetinaNetHead

        self.backbone = _backbone(kind, 5)
        sizes = tuple(_sizes(4 * stride) for stride in STRIDES)
        self.head = RetinaNetHead(256, len(RATIOS) * len(sizes[0]), classes)
        self.pretrained_cfg = IMAGES
        self.boxes = {
            "form": "deltas", "classes": classes, "nms": 0.5, "strides": STRIDES,
            "sizes": sizes, "ratios": RATIOS,
        }  # fmt: skip

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return scores (B, K, classes) and boxes (B, K, 4) of K anchors for images `x` (B, 3, H, W)."""
        found = self.head(list(self.backbone(x).values()))
        return {"scores": found["cls_logits"], "boxes": found["bbox_regression"]}


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "retinanet_r50": partial(RetinaNet, "resnet50"),
    "retinanet_r18": partial(RetinaNet, "resnet18"),
    "retinanet_mobilenetv2": partial(RetinaNet, "mobilenet_v2"),
}
