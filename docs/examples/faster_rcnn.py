"""Faster R-CNN (Ren et al., 2015) of torchvision as two engines: what proposes boxes, and what judges the regions in them.

export FASTER_RCNN=/path/to/fasterrcnn_resnet50_fpn_coco-258fb6c6.pth
make engine MODULE=docs/examples/faster_rcnn.py:Proposals CALIB=/data/photos
.venv/bin/python docs/examples/faster_rcnn.py write /data/photos        # regions.npz, for the second engine
make engine MODULE=docs/examples/faster_rcnn.py:Regions CALIB=regions.npz
.venv/bin/python docs/examples/faster_rcnn.py compare artifacts/faster_rcnn.Proposals/int8 \
  artifacts/faster_rcnn.Regions/int8 /data/photos

Between the two, proposals are chosen and regions cut out of the feature maps (RoIAlign), behind them repeated boxes are
dropped: by torchvision, on the CPU, because TensorRT-RTX builds neither on a host without a GPU. Without FASTER_RCNN= the
weights are random.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads

if TYPE_CHECKING:
    from deploy.measure.boxes import Found

BACKBONE = "resnet50"  # or another of torchvision, such as resnet18
SIDE, CLASSES = 640, 91  # pixels of the images that are read; COCO's ids, of which 0 is the background
STRIDES, SIZES, RATIOS = (4, 8, 16, 32, 64), ((32,), (64,), (128,), (256,), (512,)), (0.5, 1.0, 2.0)
LEVELS = ("0", "1", "2", "3", "pool")  # of the feature maps, finest first
IMAGES: dict[str, Any] = {
    "input_size": (3, SIDE, SIDE), "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash",
    "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
}  # fmt: skip
REGIONS = 100  # proposals of an image that the second engine reads


def whole() -> FasterRCNN:
    """Build torchvision's network in eval mode, with the weights of FASTER_RCNN= or random ones."""
    backbone = resnet_fpn_backbone(backbone_name=BACKBONE, weights=None, norm_layer=nn.BatchNorm2d)
    net = FasterRCNN(backbone, CLASSES, rpn_post_nms_top_n_test=REGIONS)
    if path := os.environ.get("FASTER_RCNN"):
        missing, unexpected = net.load_state_dict(torch.load(path, weights_only=True), strict=False)
        if unexpected or any(not name.endswith("num_batches_tracked") for name in missing):
            raise SystemExit(f"FASTER_RCNN={path} does not fit torchvision's Faster R-CNN with {BACKBONE}")
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 0.0  # as torchvision sets it for the weights that it publishes
    return net.eval()


class Proposals(nn.Module):
    """Backbone, feature pyramid and the head that proposes boxes of `net`, else of `whole()`: the first engine."""

    def __init__(self, net: FasterRCNN | None = None) -> None:
        super().__init__()
        net = net or whole()
        self.backbone, self.head = net.backbone, net.rpn.head
        self.pretrained_cfg = IMAGES
        self.boxes = {
            "form": "deltas", "classes": 1, "nms": 0.7, "strides": STRIDES, "sizes": SIZES, "ratios": RATIOS,
        }  # fmt: skip

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute of images (B, 3, H, W) the features of each level, scores (B, K, 1) and boxes (B, K, 4) of K anchors."""
        features = self.backbone(images)
        scores, boxes = self.head(list(features.values()))
        found = {f"features_{level}": each for level, each in features.items() if level != LEVELS[-1]}
        rows = [each.permute(0, 2, 3, 1).flatten(1)[:, :, None] for each in scores]
        places = [each.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for each in boxes]
        return {**found, "scores": torch.cat(rows, 1), "boxes": torch.cat(places, 1)}


class Regions(nn.Module):
    """The head of `heads`, else of `whole()`, that judges regions: the second engine, with one sample per region."""

    def __init__(self, heads: RoIHeads | None = None) -> None:
        super().__init__()
        heads = heads or whole().roi_heads
        self.head, self.predictor = heads.box_head, heads.box_predictor

    def forward(self, regions: Tensor) -> dict[str, Tensor]:
        """Compute of regions (N, 256, 7, 7) scores (N, classes) and offsets of their boxes (N, 4 classes or 4)."""
        scores, boxes = self.predictor(self.head(regions))
        return {"scores": scores, "boxes": boxes}


def maps_of(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the feature maps that regions are cut out of, by level, of what `Proposals` returned."""
    return {level: found[f"features_{level}"] for level in LEVELS[:-1]}


def proposals_of(net: FasterRCNN, found: Mapping[str, Tensor], size: tuple[int, int]) -> list[Tensor]:
    """Return the proposals of every image, (n, 4) in pixels, of what `Proposals` returned."""
    features = maps_of(found)
    maps = [*features.values(), nn.functional.max_pool2d(features[LEVELS[-2]], 1, 2)]
    count = len(found["scores"])
    anchors = net.rpn.anchor_generator(ImageList(found["scores"].new_zeros(count, 3, *size), [size] * count), maps)
    each = [len(RATIOS) * maps[level].shape[2] * maps[level].shape[3] for level in range(len(maps))]
    boxes = net.rpn.box_coder.decode(found["boxes"].reshape(-1, 4), anchors).view(count, -1, 4)
    return net.rpn.filter_proposals(boxes, found["scores"].reshape(-1, 1), [size] * count, each)[0]


def regions_of(net: FasterRCNN, found: Mapping[str, Tensor], size: tuple[int, int]) -> tuple[list[Tensor], Tensor]:
    """Return (the proposals of every image, (n, 4) in pixels, their regions (N, 256, 7, 7)) of what `Proposals` returned."""
    kept = proposals_of(net, found, size)
    return kept, net.roi_heads.box_roi_pool(maps_of(found), kept, [size] * len(kept))


def detect(
    net: FasterRCNN, images: Tensor, first: Callable[[Tensor], Any], second: Callable[[Tensor], Any]
) -> list[dict[str, Tensor]]:
    """Return boxes, scores and labels of every image (B, 3, H, W), as torchvision does, by these two networks or engines."""
    size = (images.shape[2], images.shape[3])
    kept, regions = regions_of(net, first(images), size)
    found = second(regions)
    every = zip(
        *net.roi_heads.postprocess_detections(found["scores"], found["boxes"], kept, [size] * len(images)), strict=True
    )
    return [{"boxes": boxes, "scores": scores, "labels": labels} for boxes, scores, labels in every]


def images_in(folder: Path, size: tuple[int, int], prepared: Mapping[str, Any] = IMAGES) -> Iterator[Tensor]:
    """Yield the images of a folder, (1, 3, H, W) each of this `size`, `prepared` as `Proposals` reads them or otherwise."""
    from calib.errors import UserError
    from calib.images.folder import listed
    from calib.images.preprocess import array_from_image, preprocessing_from_config

    if not folder.is_dir() or not (names := listed(folder).images):
        raise UserError(f"'{folder}' holds no images: expected a folder of JPEG or PNG files")
    preparation = preprocessing_from_config({**prepared, "input_size": (3, *size)})
    for name in names:
        try:
            with Image.open(folder / name) as image:
                yield torch.from_numpy(array_from_image(image, preparation))[None]
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"'{folder / name}' cannot be read ({error}): expected an image") from error


def graph_of(package: Path, names: Sequence[str], part: nn.Module) -> Callable[..., dict[str, Tensor]]:
    """Return the INT8 graph of a package, a function of its inputs `names`. Raises UserError for weights not of `part`."""
    from calib.errors import UserError
    from calib.weights.load import state_sha256
    from deploy.measure.onnx_runner import OnnxRunner
    from deploy.package import MANIFEST, MODEL_FP32, read_json

    if read_json(package / MANIFEST)["weights"]["sha256"] != state_sha256(part):
        raise UserError(f"'{package}' was built from other weights than those that are given now")
    run = OnnxRunner(package / MODEL_FP32)

    def outputs(*given: Tensor) -> dict[str, Tensor]:
        arrays = {name: each.numpy() for name, each in zip(names, given, strict=True)}
        return {key: torch.from_numpy(value) for key, value in run.named_outputs(arrays).items()}

    return outputs


def size_of(package: Path) -> tuple[int, int]:
    """Return height and width of the images that a package reads. Raises UserError for one that reads something else."""
    from calib.errors import UserError
    from deploy.package import MANIFEST, read_json

    shape = read_json(package / MANIFEST)["io"]["inputs"][0]["max"]
    if len(shape) != 4:
        raise UserError(f"'{package}' reads no images: expected the package of the first engine")
    return shape[2], shape[3]


def told(truth: "list[Found]", found: "list[Found]") -> str:
    """Tell how well boxes `found` in every image are those of the float network, `truth`."""
    from deploy.measure.tasks.boxes import CERTAIN, average_precision, lost_and_moved

    truth = [each.above(CERTAIN) for each in truth]
    ap50, ap = average_precision(truth, found)
    if ap is None or ap50 is None:
        return "the float network is certain of no box in these images: nothing to compare"
    lost, moved = lost_and_moved(truth, found)
    count = sum(len(each.scores) for each in truth)
    others = "" if moved is None else f", the others moved by {moved:.1f} pixels (median)"
    return f"{count} boxes of the float network: AP {ap:.3f}, at overlap .5 {ap50:.3f}\n{lost} lost{others}"


def write(args: argparse.Namespace) -> None:
    """Write the regions that the float network proposes in the images of a folder."""
    net, first, rows, groups = whole(), Proposals().eval(), [], []
    with torch.inference_mode():
        for number, image in enumerate(images_in(args.images, (args.side, args.side))):
            regions = regions_of(net, first(image), (args.side, args.side))[1][: args.regions]
            rows.append(regions.numpy())
            groups += [number] * len(regions)
    np.savez(args.to, regions=np.concatenate(rows), groups=np.array(groups))
    print(f"{args.to}: {len(groups)} regions of {len(rows)} images")


def compare(args: argparse.Namespace) -> None:
    """Print how well both INT8 graphs together find what the float network finds in the images of a folder."""
    from deploy.measure.boxes import Found

    net, exact = whole(), (Proposals().eval(), Regions().eval())
    packages = zip((args.proposals, args.regions), (("input",), ("regions",)), exact, strict=True)
    rounded = [graph_of(*each) for each in packages]
    truth, found = [], []
    with torch.inference_mode():
        for image in images_in(args.images, size_of(args.proposals)):
            for networks, kept in ((exact, truth), (rounded, found)):
                (one,) = detect(net, image, *networks)
                kept.append(Found(one["boxes"].numpy(), one["scores"].numpy(), one["labels"].numpy()))
    print(told(truth, found))


def answer(parser: argparse.ArgumentParser, argv: list[str] | None) -> int:
    """Run the command that `argv` names, the `run` of its options; returns the exit code."""
    from deploy.cli import answered

    args = parser.parse_args(argv)

    def done() -> int:
        args.run(args)
        return 0

    return answered(done)


def main(argv: list[str] | None = None) -> int:
    """Run one of the two commands; returns the exit code."""
    sys.path.insert(0, str(Path(__file__).parents[2]))  # the tool itself
    parser = argparse.ArgumentParser(description=main.__doc__)
    verbs = parser.add_subparsers(required=True)
    writing = verbs.add_parser("write", help="write regions.npz, which the second engine is calibrated on")
    writing.add_argument("images", type=Path, help="a folder")
    writing.add_argument("--side", type=int, default=SIDE, help=f"what INPUT= was in pixels (default {SIDE})")
    writing.add_argument("--regions", type=int, default=8, help="of every image (default 8)")
    writing.add_argument("--to", type=Path, default=Path("regions.npz"))
    comparing = verbs.add_parser("compare", help="compare both packages together with the float network")
    for each in ("proposals", "regions", "images"):
        comparing.add_argument(each, type=Path)
    for verb, run in ((writing, write), (comparing, compare)):
        verb.set_defaults(run=run)
    return answer(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
