"""Mask R-CNN (He et al., 2017) with a Swin transformer of timm and the heads of torchvision, as three engines.

export MASK_RCNN=/path/to/yours.pth     # the state dict of `whole()` below; without it the weights are random
make engine MODULE=docs/examples/mask_rcnn.py:Proposals CALIB=/data/photos
.venv/bin/python docs/examples/mask_rcnn.py write /data/photos     # regions.npz and masks.npz, for the other engines
make engine MODULE=docs/examples/mask_rcnn.py:Regions CALIB=regions.npz
make engine MODULE=docs/examples/mask_rcnn.py:Masks CALIB=masks.npz
.venv/bin/python docs/examples/mask_rcnn.py compare artifacts/mask_rcnn.Proposals/int8 artifacts/mask_rcnn.Regions/int8 \
  artifacts/mask_rcnn.Masks/int8 /data/photos

The first two are those of faster_rcnn.py, which lies beside this file; the third judges which pixels of a box belong to its
object. The image size is fixed: windows of 7 x 7 fit all four maps of 672 x 672 pixels.
"""

import argparse
import os
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import faster_rcnn
import numpy as np
import timm
import torch
from faster_rcnn import detect, graph_of, images_in, maps_of, regions_of, size_of, told
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

BACKBONE = "swin_tiny_patch4_window7_224"  # or swin_small_..., swin_base_...
SIDE, CLASSES, WIDTH = 672, 91, 256  # pixels; COCO's ids, of which 0 is the background; channels of the feature maps


class Pyramid(nn.Module):
    """Four maps of a Swin transformer and the pyramid of features over them, coarsest last."""

    out_channels = WIDTH

    def __init__(self) -> None:
        super().__init__()
        self.body = timm.create_model(BACKBONE, features_only=True, img_size=SIDE)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), WIDTH, LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute of images (B, 3, SIDE, SIDE) maps (B, WIDTH, h, w) by the names of faster_rcnn.LEVELS."""
        maps = [each.permute(0, 3, 1, 2) for each in self.body(images)]  # Swin's have their channels last
        return self.fpn({str(level): each for level, each in enumerate(maps)})


def whole() -> MaskRCNN:
    """Build the network in eval mode, with the weights of MASK_RCNN= or random ones."""
    net = MaskRCNN(Pyramid(), CLASSES, rpn_post_nms_top_n_test=faster_rcnn.REGIONS)
    return with_weights(net, "MASK_RCNN")


def with_weights(net: MaskRCNN, variable: str) -> MaskRCNN:
    """Return `net` in eval mode, with the weights in the file that the environment variable names, if it is set.

    Raises UserError for a file that holds no state dict of such a network.
    """
    from calib.errors import UserError

    if path := os.environ.get(variable):
        try:
            net.load_state_dict(torch.load(path, weights_only=True))
        except (OSError, EOFError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError) as error:
            first, *others = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
            raise UserError(
                f"{variable}={path} cannot be read ({' '.join([first, *others[:1]])[:200]}): expected a file with the state "
                f"dict of the example's whole()"
            ) from error
    return net.eval()


def Proposals(net: MaskRCNN | None = None) -> nn.Module:  # noqa: N802 - the name of its package
    """Build the first engine's network of `net` or `whole()`: backbone, feature pyramid, the head that proposes boxes."""
    proposals = faster_rcnn.Proposals(net or whole())
    proposals.pretrained_cfg = {**faster_rcnn.IMAGES, "input_size": (3, SIDE, SIDE)}
    return proposals


def Regions() -> nn.Module:  # noqa: N802
    """Build the second engine's network: the head that judges regions of the feature maps."""
    return faster_rcnn.Regions(whole().roi_heads)


class Masks(nn.Module):
    """The head of `heads`, else of `whole()`, that draws the masks: the third engine, with one sample per region."""

    def __init__(self, heads: RoIHeads | None = None) -> None:
        super().__init__()
        heads = heads or whole().roi_heads
        self.head, self.predictor = heads.mask_head, heads.mask_predictor

    def forward(self, regions: Tensor) -> Tensor:
        """Compute of regions (N, 256, 14, 14) the logits (N, classes, 28, 28) of the pixels of each class's mask."""
        return self.predictor(self.head(regions))


def masks_of(
    net: MaskRCNN, found: Mapping[str, Tensor], boxes: Tensor, labels: Tensor, head: Callable[[Tensor], Any]
) -> Tensor:
    """Return which pixels (n, 28, 28) of `boxes` (n, 4) belong to objects; `found`: what `Proposals` gave of the image."""
    regions = net.roi_heads.mask_roi_pool(maps_of(found), [boxes], [(SIDE, SIDE)])
    return head(regions)[torch.arange(len(labels)), labels] > 0


def write(args: argparse.Namespace) -> None:
    """Write the regions that the float network proposes in the images of a folder, for both heads."""
    net, first = whole(), Proposals().eval()
    rows: dict[str, list[Any]] = {"regions": [], "masks": []}
    groups: list[int] = []
    with torch.inference_mode():
        for number, image in enumerate(images_in(args.images, (SIDE, SIDE))):
            found = first(image)
            kept, regions = regions_of(net, found, (SIDE, SIDE))
            boxes = kept[0][: args.regions]
            rows["regions"].append(regions[: args.regions].numpy())
            rows["masks"].append(net.roi_heads.mask_roi_pool(maps_of(found), [boxes], [(SIDE, SIDE)]).numpy())
            groups += [number] * len(boxes)
    for name, each in rows.items():
        np.savez(args.to / f"{name}.npz", regions=np.concatenate(each), groups=np.array(groups))
    print(f"{args.to}: {len(groups)} regions of {len(rows['regions'])} images in regions.npz and masks.npz")


def compared(
    net: MaskRCNN,
    folder: Path,
    exact: Sequence[Callable[..., Any]],
    rounded: Sequence[Callable[..., Any]],
    detected: Callable[..., dict[str, Tensor]],
) -> None:
    """Print how well the networks `rounded` find and draw together what `exact` does in the images of a folder.

    Args:
        net: what cuts the regions of the masks.
        folder: of images.
        exact: what proposes boxes, one or several heads that judge regions, and the head that draws masks.
        rounded: the same in INT8.
        detected: gives "boxes" (n, 4), "scores" and "labels" in an image (1, 3, SIDE, SIDE), of what the first network
            found there and the heads that judge regions.
    """
    from deploy.measure.boxes import Found

    truth: list[Found] = []
    found: list[Found] = []
    overlaps = []
    with torch.inference_mode():
        for image in images_in(folder, (SIDE, SIDE)):
            proposed = [networks[0](image) for networks in (exact, rounded)]
            both = [
                detected(image, each, *networks[1:-1])
                for each, networks in zip(proposed, (exact, rounded), strict=True)
            ]
            for one, kept in zip(both, (truth, found), strict=True):
                kept.append(Found(one["boxes"].numpy(), one["scores"].numpy(), one["labels"].numpy()))
            boxes, labels = both[0]["boxes"], both[0]["labels"]
            drawn = [
                masks_of(net, each, boxes, labels, networks[-1])
                for each, networks in zip(proposed, (exact, rounded), strict=True)
            ]
            either = (drawn[0] | drawn[1]).flatten(1).sum(1)
            overlaps.append(((drawn[0] & drawn[1]).flatten(1).sum(1) / either)[either > 0])
    print(told(truth, found))
    every = torch.cat(overlaps)
    print(f"masks of {len(every)} boxes of the float network: overlap {float(every.mean()):.3f} (mean)")


def graphs_of(packages: Sequence[Path], exact: Sequence[nn.Module]) -> list[Callable[..., dict[str, Tensor]]]:
    """Return the INT8 graphs of packages, the first of which reads images. Raises UserError if they are not of `exact`."""
    from calib.errors import UserError

    if size_of(packages[0]) != (SIDE, SIDE):
        raise UserError(f"'{packages[0]}' reads other images than {SIDE} x {SIDE}: build it without INPUT=")
    names = ["input", *["regions"] * (len(packages) - 1)]
    return [graph_of(package, [name], part) for package, name, part in zip(packages, names, exact, strict=True)]


def compare(args: argparse.Namespace) -> None:
    """Print how well the INT8 graphs together find and draw what the float network does in the images of a folder."""
    net, exact = whole(), (Proposals().eval(), Regions().eval(), Masks().eval())
    first, second, third = graphs_of((args.proposals, args.regions, args.masks), exact)

    def detected(image: Tensor, proposed: dict[str, Tensor], head: Callable[[Tensor], Any]) -> dict[str, Tensor]:
        return detect(net, image, lambda _: proposed, head)[0]

    compared(net, args.images, exact, (first, second, lambda regions: third(regions)["output"]), detected)


def run(
    argv: list[str] | None,
    parts: Sequence[str],
    write: Callable[[argparse.Namespace], None],
    compare: Callable[[argparse.Namespace], None],
) -> int:
    """Run one of the two commands of an example whose engines are named `parts`; returns the exit code."""
    sys.path.insert(0, str(Path(__file__).parents[2]))  # the tool itself
    parser = argparse.ArgumentParser(description="Run one of the two commands.")
    verbs = parser.add_subparsers(required=True)
    writing = verbs.add_parser("write", help="write the regions that the other engines are calibrated on")
    writing.add_argument("images", type=Path, help="a folder")
    writing.add_argument("--regions", type=int, default=8, help="of every image (default 8)")
    writing.add_argument("--to", type=Path, default=Path(), help="folder (default: this one)")
    comparing = verbs.add_parser("compare", help="compare the packages together with the float network")
    for each in (*parts, "images"):
        comparing.add_argument(each, type=Path)
    for verb, command in ((writing, write), (comparing, compare)):
        verb.set_defaults(run=command)
    return faster_rcnn.answer(parser, argv)


def main(argv: list[str] | None = None) -> int:
    """Run one of the two commands; returns the exit code."""
    return run(argv, ("proposals", "regions", "masks"), write, compare)


if __name__ == "__main__":
    sys.exit(main())
