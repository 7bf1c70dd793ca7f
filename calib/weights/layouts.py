"""The names that other libraries give to the weights of networks that timm has as well, as tables.

A table pairs the start of a name there with its start here. `{n}` is a number, `{n+1}` and `{n/2}` count from it; what
follows the start stays. `#0`, `#1`, `#2` are parts of one tensor here, joined along their first axis.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from calib.weights.state import is_read

if TYPE_CHECKING:
    from torch import Tensor

    StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """How one library names the weights of a family of networks."""

    name: str  # whose names they are, for messages
    mark: str  # a name that only this layout has, as a regular expression
    names: Mapping[str, str] = field(default_factory=dict)  # theirs -> ours, the first that fits; empty: not converted
    in_order: str = ""  # what their numbered layers begin with that follow each other as in timm, under other numbers
    left_out: tuple[str, ...] = ()  # starts of names that timm's network computes or has no use for
    why_not: str = ""  # why it is not converted


_TRANSFORMER_PARTS = {
    "attention.attention.query": "attn.qkv#0",
    "attention.attention.key": "attn.qkv#1",
    "attention.attention.value": "attn.qkv#2",
    "attention.self.query": "attn.qkv#0",
    "attention.self.key": "attn.qkv#1",
    "attention.self.value": "attn.qkv#2",
    "attention.self.relative_position_bias_table": "attn.relative_position_bias_table",
    "attention.relative_position_bias.relative_position_bias_table": "attn.relative_position_bias_table",
    "attention.q_proj": "attn.qkv#0",
    "attention.k_proj": "attn.qkv#1",
    "attention.v_proj": "attn.qkv#2",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "norm1": "norm1",
    "norm2": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}
_TORCHVISION_VIT_PARTS = {
    "ln_1": "norm1",
    "ln_2": "norm2",
    "self_attention.in_proj_weight": "attn.qkv.weight",
    "self_attention.in_proj_bias": "attn.qkv.bias",
    "self_attention.out_proj": "attn.proj",
    "mlp.linear_1": "mlp.fc1",  # before torchvision 0.13
    "mlp.linear_2": "mlp.fc2",
    "mlp.0": "mlp.fc1",
    "mlp.3": "mlp.fc2",
}
_CLASSIFIER = {"classifier.1": "classifier"}
_OTHER_EPSILON = "its BatchNorms have another epsilon than timm's"


def _inside(theirs: str, ours: str, parts: Mapping[str, str]) -> dict[str, str]:
    """Return the table of the `parts` of a block."""
    return {f"{theirs}.{part}": f"{ours}.{here}" for part, here in parts.items()}


LAYOUTS = (
    # These two take a mean off the values and add it again, which calib/weights/super_resolution.py does itself.
    Layout("EDSR-PyTorch", r"sub_mean\.weight", {"head": "head"}, left_out=("sub_mean.", "add_mean.")),
    Layout(
        "Hugging Face's ViT, DeiT or DINOv2",
        r"(encoder\.)?layers?\.0\.attention\.(attention\.query|q_proj)\.weight",
        {
            "embeddings.cls_token": "cls_token",
            "embeddings.distillation_token": "dist_token",
            "embeddings.mask_token": "mask_token",  # of DINOv2, as the name below: official ones, which timm converts
            "embeddings.register_tokens": "register_tokens",
            "embeddings.position_embeddings": "pos_embed",
            "embeddings.patch_embeddings.projection": "patch_embed.proj",
            "layernorm": "norm",
            "classifier": "head",
            "cls_classifier": "head",
            "distillation_classifier": "head_dist",
            **_inside("encoder.layer.{n}", "blocks.{n}", _TRANSFORMER_PARTS),
            **_inside("layers.{n}", "blocks.{n}", _TRANSFORMER_PARTS),
        },
        left_out=("pooler.",),
    ),
    Layout(
        "Hugging Face's Swin",
        r"encoder\.layers\.0\.blocks\.0\.attention\.(self\.query|q_proj)\.weight",
        {
            "embeddings.patch_embeddings.projection": "patch_embed.proj",
            "embeddings.norm": "patch_embed.norm",
            "encoder.layers.{n}.downsample": "layers.{n+1}.downsample",
            "layernorm": "norm",
            "classifier": "head.fc",
            **_inside("encoder.layers.{n}.blocks.{k}", "layers.{n}.blocks.{k}", _TRANSFORMER_PARTS),
        },
        left_out=("pooler.", "embeddings.mask_token"),
    ),
    Layout(
        "Hugging Face's ResNet",
        r"embedder\.embedder\.convolution\.weight",
        {
            "embedder.embedder.convolution": "conv1",
            "embedder.embedder.normalization": "bn1",
            "encoder.stages.{n}.layers.{k}.shortcut.convolution": "layer{n+1}.{k}.downsample.0",
            "encoder.stages.{n}.layers.{k}.shortcut.normalization": "layer{n+1}.{k}.downsample.1",
            "encoder.stages.{n}.layers.{k}.layer.{i}.convolution": "layer{n+1}.{k}.conv{i+1}",
            "encoder.stages.{n}.layers.{k}.layer.{i}.normalization": "layer{n+1}.{k}.bn{i+1}",
            "classifier.1": "fc",
        },
    ),
    Layout(
        "Hugging Face's RegNet",
        r"embedder\.embedder\.convolution\.weight",
        {
            "embedder.embedder.convolution": "stem.conv",
            "embedder.embedder.normalization": "stem.bn",
            **_inside(
                "encoder.stages.{n}.layers.{k}",
                "s{n+1}.b{k+1}",
                {
                    "shortcut.convolution": "downsample.conv",
                    "shortcut.normalization": "downsample.bn",
                    "layer.2.attention.0": "se.fc1",
                    "layer.2.attention.2": "se.fc2",
                    "layer.3.convolution": "conv3.conv",  # with the squeeze-and-excitation of RegNetY before it
                    "layer.3.normalization": "conv3.bn",
                    "layer.{i}.convolution": "conv{i+1}.conv",
                    "layer.{i}.normalization": "conv{i+1}.bn",
                },
            ),
            "classifier.1": "head.fc",
        },
    ),
    Layout(
        "Hugging Face's ConvNeXt",
        r"encoder\.stages\.0\.layers\.0\.dwconv\.weight",
        {
            "embeddings.patch_embeddings": "stem.0",
            "embeddings.layernorm": "stem.1",
            "encoder.stages.{n}.downsampling_layer.{i}": "stages.{n}.downsample.{i}",
            **_inside(
                "encoder.stages.{n}.layers.{k}",
                "stages.{n}.blocks.{k}",
                {
                    "layer_scale_parameter": "gamma",
                    "dwconv": "conv_dw",
                    "layernorm": "norm",
                    "pwconv1": "mlp.fc1",
                    "grn": "mlp.grn",
                    "pwconv2": "mlp.fc2",
                },
            ),
            "layernorm": "head.norm",
            "classifier": "head.fc",
        },
    ),
    Layout(
        "torchvision's ViT",
        r"encoder\.layers\.encoder_layer_0\.ln_1\.weight",
        {
            "class_token": "cls_token",
            "conv_proj": "patch_embed.proj",
            "encoder.pos_embedding": "pos_embed",
            "encoder.ln": "norm",
            "heads.head": "head",
            **_inside("encoder.layers.encoder_layer_{n}", "blocks.{n}", _TORCHVISION_VIT_PARTS),
        },
    ),
    Layout(
        "torchvision's Swin",
        r"features\.1\.0\.attn\.relative_position_bias_table",
        {
            "features.0.0": "patch_embed.proj",
            "features.0.2": "patch_embed.norm",
            "features.{n}.reduction": "layers.{n/2}.downsample.reduction",
            "features.{n}.norm": "layers.{n/2}.downsample.norm",
            "features.{n}.{k}.mlp.0": "layers.{n/2}.blocks.{k}.mlp.fc1",
            "features.{n}.{k}.mlp.3": "layers.{n/2}.blocks.{k}.mlp.fc2",
            "features.{n}.{k}": "layers.{n/2}.blocks.{k}",
            "head": "head.fc",
        },
    ),
    Layout(
        "torchvision's ConvNeXt",
        r"features\.1\.0\.layer_scale",
        {
            "features.0.{k}": "stem.{k}",
            "features.{n}.{k}.layer_scale": "stages.{n/2}.blocks.{k}.gamma",
            "features.{n}.{k}.block.0": "stages.{n/2}.blocks.{k}.conv_dw",
            "features.{n}.{k}.block.2": "stages.{n/2}.blocks.{k}.norm",
            "features.{n}.{k}.block.3": "stages.{n/2}.blocks.{k}.mlp.fc1",
            "features.{n}.{k}.block.5": "stages.{n/2}.blocks.{k}.mlp.fc2",
            "features.{n}.{k}": "stages.{n/2}.downsample.{k}",
            "classifier.0": "head.norm",
            "classifier.2": "head.fc",
        },
    ),
    Layout(
        "torchvision's RegNet",
        r"trunk_output\.block1\.block1-0\.f\.a\.0\.weight",
        {
            "stem.0": "stem.conv",
            "stem.1": "stem.bn",
            **_inside(
                "trunk_output.block{n}.block{m}-{k}",
                "s{n}.b{k+1}",
                {
                    "proj.0": "downsample.conv",
                    "proj.1": "downsample.bn",
                    "f.a.0": "conv1.conv",
                    "f.a.1": "conv1.bn",
                    "f.b.0": "conv2.conv",
                    "f.b.1": "conv2.bn",
                    "f.se": "se",
                    "f.c.0": "conv3.conv",
                    "f.c.1": "conv3.bn",
                },
            ),
            "fc": "head.fc",
        },
    ),
    Layout("torchvision's MobileNet-v2", r"features\.1\.conv\.0\.0\.weight", _CLASSIFIER, "features."),
    Layout("torchvision's MNASNet", r"layers\.8\.0\.layers\.0\.weight", _CLASSIFIER, "layers."),
    Layout("torchvision's EfficientNet-B5 to B7", r"features\.1\.2\.block\.1\.fc1\.weight", why_not=_OTHER_EPSILON),
    Layout("torchvision's EfficientNet", r"features\.1\.0\.block\.1\.fc1\.weight", _CLASSIFIER, "features."),
    # its own mark lies in the smaller ones too, so it comes after them
    Layout("torchvision's EfficientNet-v2", r"features\.2\.0\.block\.1\.0\.weight", why_not=_OTHER_EPSILON),
    Layout("torchvision's MobileNet-v3", r"features\.1\.block\.0\.0\.weight", why_not=_OTHER_EPSILON),
    Layout("torchvision's Swin-v2", r"features\.1\.0\.attn\.logit_scale", why_not="its position tables are others"),
    Layout(
        "Hugging Face's MobileNet-v2", r"conv_stem\.first_conv\.convolution\.weight", why_not="it pads as TensorFlow does"
    ),
)  # fmt: skip
# What Hugging Face's classifiers put before the names of the network without its classifier.
_BASE = re.compile(r"(vit|deit|dinov2|dinov2_with_registers|swin|resnet|regnet|convnext|convnextv2)\.")


def _pattern(theirs: str) -> re.Pattern[str]:
    """Return what matches the start of a name that a table writes as `theirs`."""
    return re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(theirs)) + r"(?=\.|$)")


def _filled(ours: str, numbers: Mapping[str, str]) -> str:
    def number(found: re.Match[str]) -> str:
        n, by = int(numbers[found[1]]), int(found[3] or 0)
        return str(n // by if found[2] == "/" else n + by)

    return re.sub(r"\{(\w)(?:([+/])(\d))?\}", number, ours)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _counted(module: str) -> list[tuple[int, str]]:
    """Return a key that sorts the 10th layer after the 9th."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in module.split(".")]


def _in_order(state: "StateDict", net: "StateDict", layout: Layout) -> dict[str, str]:
    """Return their module -> ours for the layers that follow each other as in `net`; empty unless all shapes are equal."""
    named = set(layout.names.values())
    theirs = sorted({_module(key) for key in state if key.startswith(layout.in_order)}, key=_counted)
    ours = list(dict.fromkeys(_module(key) for key in net if _module(key) not in named))

    def shapes(tensors: "StateDict", module: str) -> dict[str, tuple[int, ...]]:
        inside = (key for key in tensors if _module(key) == module and is_read(key))
        return {key.rpartition(".")[2]: tuple(tensors[key].shape) for key in inside}

    if len(theirs) != len(ours) or any(
        shapes(state, one) != shapes(net, other) for one, other in zip(theirs, ours, strict=True)
    ):
        return {}
    return dict(zip(theirs, ours, strict=True))


def _shaped(tensor: "Tensor", wanted: "Tensor | None") -> "Tensor":
    """Return `tensor` in the shape `wanted` if they differ by dimensions of length one only."""
    if wanted is None or [n for n in tensor.shape if n != 1] != [n for n in wanted.shape if n != 1]:
        return tensor
    return tensor.reshape(wanted.shape)


def _translated(state: "StateDict", net: "StateDict", layout: Layout) -> "StateDict":
    import torch

    table = {**layout.names, **(_in_order(state, net, layout) if layout.in_order else {})}
    rules = [(_pattern(theirs), ours) for theirs, ours in table.items()]
    found: StateDict = {}
    parts: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for given, tensor in state.items():
        name = _BASE.sub("", given, count=1) if _BASE.match(given) else given
        if name.startswith(layout.left_out):
            continue
        match, ours = next(((m, ours) for pattern, ours in rules if (m := pattern.match(name))), (None, ""))
        if match is None:
            found[name] = tensor
            continue
        start, _, part = _filled(ours, match.groupdict()).partition("#")
        if part:
            parts[start + name[match.end() :]][int(part)] = tensor
        else:
            found[start + name[match.end() :]] = tensor
    found |= {name: torch.cat([pieces[n] for n in sorted(pieces)]) for name, pieces in parts.items()}
    return {name: _shaped(tensor, net.get(name)) for name, tensor in found.items()}


def _marked(names: Iterable[str], layout: Layout) -> bool:
    return any(re.search(rf"(^|\.){layout.mark}$", name) for name in names)


def layout_of(state: "StateDict", net: "StateDict") -> tuple[Layout | None, "StateDict"]:
    """Return (the layout whose names `state` has, its tensors under timm's names where that layout is converted).

    `net`: the tensors of timm's network in the order of its layers. Of layouts that look alike, the one whose names fit
    `net` best is taken, unless the first of them is not converted. (None, `state`) for names that no layout has; what the
    network has no place for keeps its name.
    """
    found = [each for each in LAYOUTS if _marked(state, each) and not _marked(net, each)]
    if not found:
        return None, state
    if not found[0].names:
        return found[0], state
    tried = [(layout, _translated(state, net, layout)) for layout in found if layout.names]
    return max(tried, key=lambda pair: len(pair[1].keys() & net.keys()))
