"""Depth Anything of transformers, DINOv2 with a DPT head: MODULE=docs/examples/depth_anything.py:Depth.

.venv/bin/pip install transformers==5.24.0
export DEPTH=/models/Depth-Anything-V2-Small-hf    # a folder that from_pretrained reads; without it: random weights
make engine MODULE=docs/examples/depth_anything.py:Depth CALIB=/data/photos
"""

import os

from torch import Tensor, nn
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

SIDE = 518  # pixels: a multiple of the patches' 14
BACKBONE = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}  # ViT-S
LAYERS = (3, 6, 9, 12)  # of the backbone, whose features the head reads
HEAD = {
    "reassemble_hidden_size": 384, "neck_hidden_sizes": [48, 96, 192, 384], "fusion_hidden_size": 64, "head_hidden_size": 32,
}  # fmt: skip


class Depth(nn.Module):
    """The relative depth of every pixel, nearer ones larger. It has no unit and its values are not those of a picture."""

    pretrained_cfg = {  # noqa: RUF012 - what the tool reads, as timm writes it
        "input_size": (3, SIDE, SIDE), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
        "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "squash",
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        if folder := os.environ.get("DEPTH"):
            self.net = DepthAnythingForDepthEstimation.from_pretrained(folder)
        else:
            backbone = Dinov2Config(
                **BACKBONE, image_size=SIDE, patch_size=14, reshape_hidden_states=False,
                out_features=[f"stage{layer}" for layer in LAYERS],
            )  # fmt: skip
            self.net = DepthAnythingForDepthEstimation(DepthAnythingConfig(backbone_config=backbone, **HEAD))

    def forward(self, images: Tensor) -> Tensor:
        """Compute the depth (B, H, W) of `images` (B, 3, H, W)."""
        return self.net(images).predicted_depth
