"""DETR (Carion et al., ECCV 2020) of transformers, whose queries become boxes without suppression of repeated ones.

.venv/bin/pip install transformers==5.24.0
DETR=/path/to/detr-resnet-50 make engine MODULE=docs/examples/detr.py:detr CALIB=/data/photos

The folder is one that transformers reads (config.json, model.safetensors). Without DETR= the weights are random.
"""

import os
from typing import Any

import torch
from torch import Tensor
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

IMAGES = {
    "input_size": (3, 800, 800), "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash",
    "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
}  # fmt: skip


class Detr(DetrForObjectDetection):
    """Logits of classes, of which the last means no object, and boxes, one of each per query."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__(config)
        self.pretrained_cfg = IMAGES
        self.boxes = {
            "form": "centers", "classes": config.num_labels + 1, "activation": "softmax", "background": -1, "nms": None,
        }  # fmt: skip

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Compute scores (B, queries, classes) and boxes (B, queries, 4) of images (B, 3, H, W)."""
        everywhere = torch.ones_like(pixel_values[:, 0])  # no image is padded
        found = super().forward(pixel_values, pixel_mask=everywhere)
        return {"scores": found.logits, "boxes": found.pred_boxes}


def detr(**changes: Any) -> Detr:
    """Build DETR: of the folder DETR=, or with random weights, a ResNet-50, COCO's 91 ids and `changes` to them."""
    if folder := os.environ.get("DETR"):
        return Detr.from_pretrained(folder)
    plain = {"use_timm_backbone": False, "backbone_config": ResNetConfig(out_features=["stage4"]), "num_labels": 91}
    return Detr(DetrConfig(**{**plain, **changes}))


def small() -> Detr:
    """Build a small one, to try the commands."""
    sizes = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 32, 64], depths=[1, 1, 1, 1], out_features=["stage4"])
    return detr(
        encoder_layers=2, decoder_layers=2, d_model=64, encoder_ffn_dim=128, decoder_ffn_dim=128, num_queries=10,
        encoder_attention_heads=4, decoder_attention_heads=4, backbone_config=sizes,
    )  # fmt: skip
