"""A network of transformers, whose logits lie in an object: MODULE=docs/examples/transformers_network.py:Logits."""

from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification


class Logits(nn.Module):
    """The logits alone, (images, classes). `from_pretrained("folder")` in the place of the configuration loads weights."""

    num_classes = 1000
    pretrained_cfg = {  # noqa: RUF012 - what the tool reads, as timm writes it
        "input_size": (3, 224, 224), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bilinear",
        "crop_pct": 1.0, "crop_mode": "squash",
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.net = ViTForImageClassification(ViTConfig(num_labels=self.num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits of `images` (B, 3, H, W)."""
        return self.net(images).logits
