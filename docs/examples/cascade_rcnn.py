"""Cascade Mask R-CNN (Cai and Vasconcelos, CVPR 2018) with a Swin transformer, as five engines.

export CASCADE_RCNN=/path/to/yours.pth     # the state dict of `whole()` below; without it the weights are random
make engine MODULE=docs/examples/cascade_rcnn.py:Proposals CALIB=/data/photos
.venv/bin/python docs/examples/cascade_rcnn.py write /data/photos     # two files for each of the other engines
make engine MODULE=docs/examples/cascade_rcnn.py:First CALIB=first_calib.npz EVAL=first_eval.npz
make engine MODULE=docs/examples/cascade_rcnn.py:Second CALIB=second_calib.npz EVAL=second_eval.npz
make engine MODULE=docs/examples/cascade_rcnn.py:Third CALIB=third_calib.npz EVAL=third_eval.npz
make engine MODULE=docs/examples/cascade_rcnn.py:Masks CALIB=masks_calib.npz EVAL=masks_eval.npz
.venv/bin/python docs/examples/cascade_rcnn.py compare artifacts/cascade_rcnn.{Proposals,First,Second,Third,Masks}/int8 \
  /data/photos

Each of three box heads reads the regions of the boxes that the one before it has moved. So regions are cut out of the
feature maps between their engines, as in mask_rcnn.py, which lies beside this file and has the backbone and the image size.
The heads have the layers that the authors of Swin chose in mmdetection (four convolutions, one linear layer), except that a
box is moved for all classes together, as in mmdetection's own configurations, and not for each class by itself.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import faster_rcnn
import mask_rcnn
import numpy as np
import torch
from faster_rcnn import images_in, maps_of, proposals_of
from mask_rcnn import CLASSES, SIDE, WIDTH, Pyramid
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import clip_boxes_to_image

HIDDEN = 1024  # width of the linear layer of a box head
SPREADS = (
    (0.1, 0.1, 0.2, 0.2),
    (0.05, 0.05, 0.1, 0.1),
    (0.033, 0.033, 0.067, 0.067),
)  # of offsets: the unit of each stage
PARTS = ("proposals", "first", "second", "third", "masks")
JUDGED = 5  # of so many images one is for the eval files


class Cascade(nn.Module):
    """Stages, each of them the heads that torchvision's Mask R-CNN has one of, in the place of that one."""

    def __init__(self, stages: Sequence[RoIHeads]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.box_roi_pool, self.mask_roi_pool = stages[0].box_roi_pool, stages[0].mask_roi_pool

    def found(
        self,
        features: Mapping[str, Tensor],
        boxes: list[Tensor],
        sizes: list[tuple[int, int]],
        heads: Sequence[Callable[[Tensor], Mapping[str, Tensor]]],
    ) -> list[dict[str, Tensor]]:
        """Return "boxes" (n, 4), "scores" and "labels" of every image, where `heads`, one for each stage, judge the regions.

        As in mmdetection, the boxes are those of the last stage, and the scores of a box, in front of softmax, are the means
        of what each stage gave the region that it read.

        Args:
            features: maps (B, WIDTH, h, w) by level.
            boxes: the proposals of every image, (m, 4) in pixels.
            sizes: height and width of every image.
            heads: compute of regions (N, WIDTH, 7, 7) "scores" (N, classes) and "boxes", offsets (N, 4).
        """
        scores = []
        for stage, head in zip(self.stages, heads, strict=True):
            read = boxes
            judged = head(self.box_roi_pool(features, read, sizes))
            scores.append(judged["scores"])
            moved = stage.box_coder.decode(judged["boxes"], read)[:, 0].split([len(each) for each in read])
            boxes = [clip_boxes_to_image(*each) for each in zip(moved, sizes, strict=True)]
        mean = torch.stack(scores).mean(0)
        offsets = judged["boxes"].repeat(1, mean.shape[1])  # torchvision has them for each class
        every = self.stages[-1].postprocess_detections(mean, offsets, read, sizes)
        return [dict(zip(("boxes", "scores", "labels"), each, strict=True)) for each in zip(*every, strict=True)]

    def forward(
        self, features: Mapping[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]], _targets: None = None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return (what `found` does of this network's own heads, with "masks" (n, 1, 28, 28); nothing to learn from)."""
        results = self.found(features, boxes, sizes, [faster_rcnn.Regions(stage) for stage in self.stages])
        regions = self.mask_roi_pool(features, [each["boxes"] for each in results], sizes)
        drawn = Masks(self)(regions).split([len(each["boxes"]) for each in results])
        for result, masks in zip(results, drawn, strict=True):
            result["masks"] = masks[torch.arange(len(masks)), result["labels"]][:, None]
        return results, {}


def whole() -> MaskRCNN:
    """Build the network in eval mode, with the weights of CASCADE_RCNN= or random ones, the same every time.

    Raises UserError for a file that holds other weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pyramid, stages = Pyramid(), []
        for spread in SPREADS:
            head = FastRCNNConvFCHead((WIDTH, 7, 7), [WIDTH] * 4, [HIDDEN], nn.BatchNorm2d)
            net = MaskRCNN(
                pyramid, CLASSES, rpn_post_nms_top_n_test=faster_rcnn.REGIONS, box_head=head,
                bbox_reg_weights=tuple(1 / each for each in spread),
            )  # fmt: skip
            predictor = net.roi_heads.box_predictor
            predictor.cls_score, predictor.bbox_pred = nn.Linear(HIDDEN, CLASSES), nn.Linear(HIDDEN, 4)
            # so that random weights are certain of some classes, and move boxes by some pixels
            nn.init.normal_(predictor.cls_score.weight, std=16 / HIDDEN**0.5)
            nn.init.normal_(predictor.bbox_pred.weight, std=4 / HIDDEN**0.5)
            stages.append(net.roi_heads)
    net.roi_heads = Cascade(stages)
    return mask_rcnn.with_weights(net, "CASCADE_RCNN")


def Proposals() -> nn.Module:  # noqa: N802 - the name of its package
    """Build the first engine's network, that of mask_rcnn.py."""
    return mask_rcnn.Proposals(whole())


def First() -> nn.Module:  # noqa: N802
    """Build the head that judges the regions of the proposals."""
    return faster_rcnn.Regions(whole().roi_heads.stages[0])


def Second() -> nn.Module:  # noqa: N802
    """Build the head that judges the regions of the boxes of `First`."""
    return faster_rcnn.Regions(whole().roi_heads.stages[1])


def Third() -> nn.Module:  # noqa: N802
    """Build the head that judges the regions of the boxes of `Second`."""
    return faster_rcnn.Regions(whole().roi_heads.stages[2])


class Masks(nn.Module):
    """The heads of all stages that draw masks, in one engine: they read the same regions, those of the last boxes."""

    def __init__(self, heads: Cascade | None = None) -> None:
        super().__init__()
        self.stages = nn.ModuleList(mask_rcnn.Masks(stage) for stage in (heads or whole().roi_heads).stages)

    def forward(self, regions: Tensor) -> Tensor:
        """Compute of regions (N, 256, 14, 14) the chances (N, classes, 28, 28) of the pixels, the means over the stages."""
        return torch.stack([torch.sigmoid(stage(regions)) for stage in self.stages]).mean(0)


def networks() -> tuple[MaskRCNN, list[nn.Module]]:
    """Return the float network and its PARTS; says so if the weights are random."""
    if not os.environ.get("CASCADE_RCNN"):
        print("RANDOM WEIGHTS: figures say nothing of Cascade R-CNN")
    net = whole()
    heads = [faster_rcnn.Regions(stage) for stage in net.roi_heads.stages]
    return net, [each.eval() for each in (mask_rcnn.Proposals(net), *heads, Masks(net.roi_heads))]


def detect(
    net: MaskRCNN, proposed: Mapping[str, Tensor], heads: Sequence[Callable[[Tensor], Any]]
) -> dict[str, Tensor]:
    """Return "boxes" (n, 4), "scores" and "labels" in one image, of what `Proposals` gave of it, by these three heads."""
    size = (SIDE, SIDE)
    return net.roi_heads.found(maps_of(proposed), proposals_of(net, proposed, size), [size], heads)[0]


def regions_in(args: argparse.Namespace) -> Iterator[dict[str, np.ndarray]]:
    """Yield the regions (n, 256, h, w) that each head of the float network reads in the images of a folder, by its name."""
    net, (first, *heads, _) = networks()
    read: list[Tensor] = []
    for head in heads:
        head.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    for image in images_in(args.images, (SIDE, SIDE)):
        read.clear()
        proposed = first(image)
        boxes = detect(net, proposed, heads)["boxes"]
        read.append(net.roi_heads.mask_roi_pool(maps_of(proposed), [boxes], [(SIDE, SIDE)]))
        yield {name: each[: args.regions].numpy() for name, each in zip(PARTS[1:], read, strict=True)}


def write(args: argparse.Namespace) -> None:
    """Write the regions that the float network's heads read: a calib file each, and of every fifth image an eval file."""
    from calib.errors import UserError

    with torch.inference_mode():
        rows = list(regions_in(args))
    args.to.mkdir(parents=True, exist_ok=True)
    for name in PARTS[1:]:
        for use in ("calib", "eval"):
            kept = [number for number in range(len(rows)) if (number % JUDGED == 0) == (use == "eval")]
            groups = [number for number in kept for _ in rows[number][name]]
            if not groups:
                raise UserError(
                    f"{len(kept)} images of '{args.images}' are for {name}_{use}.npz, and none has a region: expected more"
                )
            regions = np.concatenate([rows[number][name] for number in kept])
            np.savez(args.to / f"{name}_{use}.npz", regions=regions, groups=np.array(groups))
            print(f"{args.to / name}_{use}.npz: {len(groups)} regions of {len(set(groups))} images")


def compare(args: argparse.Namespace) -> None:
    """Print how well the INT8 graphs together find and draw what the float network does in the images of a folder."""
    net, exact = networks()
    rounded = mask_rcnn.graphs_of([getattr(args, name) for name in PARTS], exact)

    def detected(_: Tensor, proposed: Mapping[str, Tensor], *heads: Callable[[Tensor], Any]) -> dict[str, Tensor]:
        return detect(net, proposed, heads)

    drawn = (lambda regions: exact[-1](regions) - 0.5, lambda regions: rounded[-1](regions)["output"] - 0.5)
    mask_rcnn.compared(net, args.images, (*exact[:-1], drawn[0]), (*rounded[:-1], drawn[1]), detected)


def main(argv: list[str] | None = None) -> int:
    """Run one of the two commands; returns the exit code."""
    return mask_rcnn.run(argv, PARTS, write, compare)


if __name__ == "__main__":
    sys.exit(main())
