"""RT-DETR (Zhao et al., CVPR 2024) of transformers as two engines: what finds candidates, and what refines the best ones.

.venv/bin/pip install transformers==5.24.0
export RT_DETR=/path/to/rtdetr_r50vd     # a folder that from_pretrained reads; without it the weights are random
make engine MODULE=docs/examples/rt_detr.py:Encoder CALIB=/data/photos
.venv/bin/python docs/examples/rt_detr.py write /data/photos     # calib.npz and eval.npz, for the second engine
make engine MODULE=docs/examples/rt_detr.py:Decoder CALIB=calib.npz EVAL=eval.npz
.venv/bin/python docs/examples/rt_detr.py compare artifacts/rt_detr.Encoder/int8 artifacts/rt_detr.Decoder/int8 /data/photos

Between the two, the 300 best of 8400 candidates are chosen on the CPU. Inside one graph, rounding would change that choice
among nearly equal scores, and with it the places of all queries behind it. `small_encoder`, `small_decoder` and the option
--small try the commands with a small network of random weights. The image size is fixed: SIDE x SIDE pixels.
"""

import argparse
import copy
import itertools
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from faster_rcnn import answer, graph_of, images_in, size_of, told
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

if TYPE_CHECKING:
    from deploy.measure.boxes import Found

SIDE, SMALL_SIDE = 640, 64  # pixels of the images that are read
IMAGES: dict[str, Any] = {
    "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash", "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0),
}  # fmt: skip
OUTSIDE = 1e3  # the logit of an anchor at the border, which counts as none: its sigmoid is 1, and FP16 holds it
LARGEST = math.log(1e5)  # of a box in front of the sigmoid, from layer to layer: transformers' 1e-5 behind it
NEAREST = 1e-7  # distance of a chosen coordinate to 0 and 1: float32 holds its logit
CHOSEN = ("memory", "target", "reference")  # what the second engine reads
JUDGED = 5  # of so many images one is for eval.npz


def with_random_weights(config: RTDetrConfig, side: int) -> RTDetrForObjectDetection:
    """Build the network with random weights, the same ones every time, that leave something to round.

    transformers starts linear layers and the gains of BatchNorm near zero, boxes and sampling points at zero. Here linear
    layers keep the size of what they read, and gains are 1 behind the statistics of two images of noise, `side` pixels wide,
    with equal parts of every octave as in photographs.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        net = RTDetrForObjectDetection(config).eval()
        norms = [each for each in net.modules() if isinstance(each, nn.BatchNorm2d)]
        for each in norms:
            nn.init.ones_(each.weight)
            each.momentum = None  # the statistics of all it sees, which is one batch
            each.train()
        for each in net.modules():
            if isinstance(each, nn.Linear):
                nn.init.xavier_uniform_(each.weight, 1.0 if each.weight.any() else 0.1)
        noise = [torch.randn(2, 3, 2**octave, 2**octave) for octave in range(2, side.bit_length())]
        net(0.5 + 0.2 * sum(nn.functional.interpolate(each, (side, side), mode="bicubic") for each in noise))
    return net.eval()


def whole() -> RTDetrForObjectDetection:
    """Build transformers' network in eval mode: that of the folder RT_DETR=, or one with random weights.

    Its BatchNorms are not frozen ones: those compute the same as plain ones, which become part of the convolutions.
    Raises UserError for a folder that holds no weights of RT-DETR.
    """
    from calib.errors import UserError

    if not (folder := os.environ.get("RT_DETR")):
        return with_random_weights(RTDetrConfig(num_labels=80, freeze_backbone_batch_norms=False), SIDE)
    expected = "expected a folder with config.json and model.safetensors of transformers' RTDetrForObjectDetection"
    if not Path(folder).is_dir():
        raise UserError(f"RT_DETR={folder} is no folder: {expected}")
    try:
        net, told_of = RTDetrForObjectDetection.from_pretrained(
            folder, freeze_backbone_batch_norms=False, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"RT_DETR={folder} cannot be read ({str(error).splitlines()[0]}): {expected}") from error
    if missing := sorted(name for name in told_of["missing_keys"] if not name.endswith("num_batches_tracked")):
        raise UserError(f"RT_DETR={folder} lacks {len(missing)} tensors, such as '{missing[0]}': {expected}")
    return net.eval()


def small() -> RTDetrForObjectDetection:
    """Build a small network with random weights, for images of SMALL_SIDE x SMALL_SIDE pixels."""
    backbone = RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 32, 64], depths=[1, 1, 1, 1], layer_type="basic", out_indices=[2, 3, 4]
    )
    config = RTDetrConfig(
        backbone_config=backbone, freeze_backbone_batch_norms=False, num_labels=8, encoder_in_channels=[32, 32, 64],
        encoder_hidden_dim=32, encoder_ffn_dim=64, encoder_attention_heads=2, d_model=32, num_queries=12,
        decoder_in_channels=[32, 32, 32], decoder_ffn_dim=64, decoder_layers=2, decoder_attention_heads=2,
    )  # fmt: skip
    return with_random_weights(config, SMALL_SIDE)


def grids_of(net: RTDetrForObjectDetection, side: int) -> tuple[tuple[int, int], ...]:
    """Return height and width of every feature map of images of `side` pixels. Raises UserError where they do not fit."""
    from calib.errors import UserError

    strides = net.config.feat_strides
    if len(strides) != net.config.num_feature_levels or any(side % stride for stride in strides):
        raise UserError(
            f"images of {side} pixels, strides {[*strides]} and {net.config.num_feature_levels} levels do not fit: "
            f"expected one stride for each level, and a side that each divides"
        )
    return tuple((side // stride, side // stride) for stride in strides)


def described(net: RTDetrForObjectDetection, side: int) -> dict[str, Any]:
    """Return how the outputs of both engines become boxes: their queries repeat no box."""
    return {"form": "centers", "image": (side, side), "classes": net.config.num_labels, "nms": None}


def merged(block: nn.Module) -> nn.Module:
    """Return the one convolution and the activation that a RepVGG block computes, whose 3x3 and 1x1 training keeps apart."""
    conv, point = (fuse_conv_bn_eval(each.conv, each.norm) for each in (block.conv1, block.conv2))
    conv.weight = nn.Parameter(conv.weight + nn.functional.pad(point.weight, [1] * 4))
    conv.bias = nn.Parameter(conv.bias + point.bias)
    return nn.Sequential(conv, block.activation)


class Encoder(nn.Module):
    """Backbone, hybrid encoder and the heads that judge every place of the maps: the first engine."""

    def __init__(self, net: RTDetrForObjectDetection | None = None, side: int = SIDE) -> None:
        super().__init__()
        net = net or whole()
        model = net.model
        self.backbone, self.to_encoder = model.backbone.model, model.encoder_input_proj
        self.encoder = copy.deepcopy(model.encoder)  # the whole network keeps its own
        for layer in (*self.encoder.fpn_blocks, *self.encoder.pan_blocks):
            layer.bottlenecks = nn.Sequential(*map(merged, layer.bottlenecks))
        self.to_decoder, self.judged = model.decoder_input_proj, model.enc_output
        self.classes, self.corners = model.enc_score_head, model.enc_bbox_head
        anchors, valid = model.generate_anchors(grids_of(net, side))
        self.register_buffer("valid", valid.float(), persistent=False)
        self.register_buffer("anchors", torch.where(valid, anchors, OUTSIDE), persistent=False)
        self.pretrained_cfg = {"input_size": (3, side, side), **IMAGES}
        self.boxes = described(net, side)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Find K candidates, one at each place of the maps, in images (B, 3, H, W).

        Returns:
            "scores" (B, K, classes) in front of the sigmoid, "boxes" (B, K, 4) as centre and size in 0..1; "memory"
            (B, K, d), the features that the decoder samples, and "targets" (B, K, d), those that a query starts from.
        """
        maps = [layer(each) for layer, each in zip(self.to_encoder, self.backbone(images).feature_maps, strict=True)]
        maps = [layer(each) for layer, each in zip(self.to_decoder, self.encoder(maps).last_hidden_state, strict=True)]
        memory = torch.cat([each.flatten(2).transpose(1, 2) for each in maps], 1)
        targets = self.judged(memory * self.valid)
        boxes = torch.sigmoid(self.corners(targets) + self.anchors)
        return {"scores": self.classes(targets), "boxes": boxes, "memory": memory, "targets": targets}


class Decoder(nn.Module):
    """The layers that refine the chosen candidates, each of them a query: the second engine."""

    def __init__(self, net: RTDetrForObjectDetection | None = None, side: int = SIDE) -> None:
        super().__init__()
        net = net or whole()
        decoder = net.model.decoder
        self.layers, self.corners, self.places = decoder.layers, decoder.bbox_embed, decoder.query_pos_head
        self.classes = decoder.class_embed[-1]
        self.grids = grids_of(net, side)
        self.boxes = described(net, side)

    def forward(self, memory: Tensor, target: Tensor, reference: Tensor) -> dict[str, Tensor]:
        """Compute scores (B, Q, classes), in front of the sigmoid, and boxes (B, Q, 4), centre and size in 0..1.

        Args:
            memory: (B, K, d), of the first engine.
            target: (B, Q, d), those of its "targets" that were chosen.
            reference: (B, Q, 4), their "boxes" in front of the sigmoid.

        Boxes stay in front of the sigmoid from layer to layer. transformers computes them from their sigmoid again: near 1,
        that divides by too little for FP16.
        """
        boxes = torch.sigmoid(reference)
        for layer, corners in zip(self.layers, self.corners, strict=True):
            target = layer(
                target, object_queries_position_embeddings=self.places(boxes), encoder_hidden_states=memory,
                reference_points=boxes[:, :, None], spatial_shapes_list=self.grids,
            )  # fmt: skip
            reference = corners(target) + reference.clamp(-LARGEST, LARGEST)
            boxes = torch.sigmoid(reference)
        return {"scores": self.classes(target), "boxes": boxes}


def small_encoder() -> Encoder:
    """Build the first engine's network of `small()`."""
    return Encoder(small(), SMALL_SIDE)


def small_decoder() -> Decoder:
    """Build the second engine's network of `small()`."""
    return Decoder(small(), SMALL_SIDE)


def chosen(found: Mapping[str, Tensor], queries: int) -> dict[str, Tensor]:
    """Return the inputs of the second engine, by the names of CHOSEN, of what the first one found: its best `queries`."""
    best = found["scores"].amax(2).topk(queries, 1).indices[:, :, None]
    target, boxes = (found[name].gather(1, best.expand(-1, -1, found[name].shape[2])) for name in ("targets", "boxes"))
    return dict(zip(CHOSEN, (found["memory"], target, boxes.logit(NEAREST)), strict=True))


def detect(
    images: Tensor, first: Callable[[Tensor], Any], second: Callable[..., Any], queries: int
) -> dict[str, Tensor]:
    """Return scores (B, queries, classes) and boxes (B, queries, 4) in images (B, 3, H, W), by these networks or engines."""
    return second(*chosen(first(images), queries).values())


def networks(args: argparse.Namespace) -> tuple[Encoder, Decoder, int]:
    """Return both float networks and the number of queries; says so if their weights are random."""
    if args.small or not os.environ.get("RT_DETR"):
        print("RANDOM WEIGHTS: figures say nothing of RT-DETR")
    net, side = (small(), SMALL_SIDE) if args.small else (whole(), SIDE)
    return Encoder(net, side).eval(), Decoder(net, side).eval(), net.config.num_queries


def write(args: argparse.Namespace) -> None:
    """Write what the float network chooses in the images of a folder, calib.npz and of every fifth image eval.npz."""
    from calib.errors import UserError

    if args.most < 2:
        raise UserError(f"--most {args.most}: expected 2 or more, one to calibrate on and one to judge")
    first, _, queries = networks(args)
    side = first.boxes["image"]
    rows: list[dict[str, np.ndarray]] = []
    with torch.inference_mode():
        for image in itertools.islice(images_in(args.images, side, first.pretrained_cfg), args.most):
            rows.append({name: each.numpy() for name, each in chosen(first(image), queries).items()})
    if len(rows) < 2:
        raise UserError(f"'{args.images}' gives one image: expected at least one to calibrate on and one to judge")
    args.to.mkdir(parents=True, exist_ok=True)
    numbers = range(len(rows))
    judged = numbers[::JUDGED]
    for name, kept in (("calib", [n for n in numbers if n not in judged]), ("eval", [*judged])):
        arrays = {key: np.concatenate([rows[number][key] for number in kept]) for key in CHOSEN}
        np.savez(args.to / f"{name}.npz", groups=np.array(kept), **arrays)
        print(f"{args.to / name}.npz: {queries} queries of each of {len(kept)} images")


def compare(args: argparse.Namespace) -> None:
    """Print how well both INT8 graphs together find what the float network finds in the images of a folder."""
    from calib.errors import UserError
    from calib.task import Boxes
    from deploy.measure.boxes import decoded

    *exact, queries = networks(args)
    said = Boxes(**exact[1].boxes)
    if size_of(args.encoder) != said.image:
        raise UserError(
            f"'{args.encoder}' reads other images than {said.image[0]} x {said.image[1]}: expected the package of "
            f"{'small_encoder' if args.small else 'Encoder, or --small'}, built without INPUT="
        )
    packages = zip((args.encoder, args.decoder), (("input",), CHOSEN), exact, strict=True)
    rounded = [graph_of(*each) for each in packages]
    truth: list[Found] = []
    found: list[Found] = []
    with torch.inference_mode():
        for image in images_in(args.images, said.image, exact[0].pretrained_cfg):
            for both, kept in ((exact, truth), (rounded, found)):
                outputs = detect(image, *both, queries)
                kept += decoded({name: each.numpy() for name, each in outputs.items()}, said)
    print(told(truth, found))


def main(argv: list[str] | None = None) -> int:
    """Run one of the two commands; returns the exit code."""
    sys.path.insert(0, str(Path(__file__).parents[2]))  # the tool itself
    parser = argparse.ArgumentParser(description=main.__doc__)
    verbs = parser.add_subparsers(required=True)
    writing = verbs.add_parser("write", help="write calib.npz and eval.npz, for the second engine")
    writing.add_argument("images", type=Path, help="a folder")
    writing.add_argument("--most", type=int, default=80, help="images that are read; 9 MB each (default 80)")
    writing.add_argument("--to", type=Path, default=Path(), help="folder for both files (default: the current one)")
    comparing = verbs.add_parser("compare", help="compare both packages together with the float network")
    for each in ("encoder", "decoder"):
        comparing.add_argument(each, type=Path, help=f"the package of the {each}")
    comparing.add_argument("images", type=Path, help="a folder")
    for verb, run in ((writing, write), (comparing, compare)):
        verb.add_argument("--small", action="store_true", help="the networks of small_encoder and small_decoder")
        verb.set_defaults(run=run)
    return answer(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
