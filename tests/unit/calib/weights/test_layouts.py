"""Weights that another library saved give timm's network the outputs of that library's network."""

from dataclasses import replace

import pytest
import torch
import torchvision.models as tv
import transformers as hf
from safetensors.torch import save_file
from torchvision.models.convnext import CNBlockConfig

from calib.errors import UserError
from calib.weights.layouts import LAYOUTS
from calib.weights.load import load_net
from calib.weights.zoo import resolve_model

VIT = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "num_hidden_layers": 12}
DINO = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 98, "patch_size": 14}
REGNET = {"embedding_size": 32, "groups_width": 24, "hidden_sizes": [48, 96, 240, 528], "depths": [1, 3, 5, 7]}
REGNET_Y = {"embedding_size": 32, "groups_width": 8, "hidden_sizes": [48, 104, 208, 440], "depths": [1, 3, 6, 6]}
CONVNEXT = {"hidden_sizes": [40, 80, 160, 320], "depths": [2, 2, 6, 2]}
RESNET = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}


def tv_vit():
    return tv.VisionTransformer(224, 16, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=5)


def tv_convnext():
    widths = [40, 80, 160, 320, None]
    return tv.ConvNeXt([CNBlockConfig(widths[n], widths[n + 1], depth) for n, depth in enumerate((2, 2, 6, 2))])


def hf_vit():
    return hf.ViTForImageClassification(hf.ViTConfig(**VIT, num_labels=5))


def logits(output):
    return output.logits


def first_token(output):
    return output.last_hidden_state[:, 0]


def pooled(output):
    return output.pooler_output.flatten(1)


# (the other library's network, what of its output, timm's name)
SAME = {
    "torchvision vit": (tv_vit, None, "vit_tiny_patch16_224"),
    "torchvision swin": (tv.swin_t, None, "swin_tiny_patch4_window7_224"),
    "torchvision convnext": (tv_convnext, None, "convnext_atto"),
    "torchvision regnet x": (tv.regnet_x_400mf, None, "regnetx_004_tv"),
    "torchvision regnet y": (tv.regnet_y_400mf, None, "regnety_004"),
    "torchvision mobilenet": (tv.mobilenet_v2, None, "mobilenetv2_100"),
    "torchvision mnasnet": (tv.mnasnet1_0, None, "mnasnet_100"),
    "torchvision efficientnet": (tv.efficientnet_b0, None, "efficientnet_b0"),
    "torchvision resnet": (tv.resnet18, None, "resnet18"),
    "hf vit": (hf_vit, logits, "vit_tiny_patch16_224"),
    "hf vit features": (lambda: hf.ViTModel(hf.ViTConfig(**VIT)), first_token, "vit_tiny_patch16_224"),
    "hf deit": (
        lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**VIT, num_labels=1000)),
        logits,
        "deit_tiny_distilled_patch16_224",
    ),
    "hf dinov2": (lambda: hf.Dinov2Model(hf.Dinov2Config(**DINO)), first_token, "vit_small_patch14_dinov2"),
    "hf dinov2 with registers": (
        lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**DINO)),
        first_token,
        "vit_small_patch14_reg4_dinov2",
    ),
    "hf swin": (
        lambda: hf.SwinForImageClassification(hf.SwinConfig(num_labels=1000)),
        logits,
        "swin_tiny_patch4_window7_224",
    ),
    "hf resnet": (lambda: hf.ResNetForImageClassification(hf.ResNetConfig(**RESNET, num_labels=5)), logits, "resnet18"),
    "hf regnet x": (
        lambda: hf.RegNetForImageClassification(hf.RegNetConfig(**REGNET, layer_type="x", num_labels=1000)),
        logits,
        "regnetx_006",
    ),
    "hf regnet y": (
        lambda: hf.RegNetForImageClassification(hf.RegNetConfig(**REGNET_Y, layer_type="y", num_labels=1000)),
        logits,
        "regnety_004",
    ),
    "hf regnet features": (
        lambda: hf.RegNetModel(hf.RegNetConfig(**REGNET, layer_type="x")), pooled, "regnetx_006"
    ),
    "hf convnext": (
        lambda: hf.ConvNextForImageClassification(hf.ConvNextConfig(**CONVNEXT, num_labels=1000)),
        logits,
        "convnext_atto",
    ),
    "hf convnext v2": (
        lambda: hf.ConvNextV2ForImageClassification(hf.ConvNextV2Config(**CONVNEXT, num_labels=1000)),
        logits,
        "convnextv2_atto",
    ),
}  # fmt: skip


def shaken(net):
    """`net` with statistics and small parameters that differ everywhere, so that no two can be confused."""
    generator = torch.Generator().manual_seed(1)
    for name, value in net.state_dict().items():
        if name.endswith("running_var"):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        elif value.is_floating_point():
            value += (0.02 if value.ndim > 1 else 0.1) * torch.randn(value.shape, generator=generator)
    return net.eval()


def spec_for(tag):
    return replace(resolve_model(tag), img_size=(98, 98)) if "dinov2" in tag else resolve_model(tag)


@pytest.mark.parametrize("case", SAME)
def test_the_network_computes_what_the_other_library_computes(tmp_path, case):
    make, output_of, tag = SAME[case]
    torch.manual_seed(0)
    theirs = shaken(make())
    save_file(
        {key: value.contiguous().clone() for key, value in theirs.state_dict().items()}, tmp_path / "x.safetensors"
    )
    loaded = load_net(spec_for(tag), str(tmp_path / "x.safetensors"))
    side = loaded.data_config["input_size"][-1]
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        expected = theirs(images) if output_of is None else output_of(theirs(images))
        found = loaded.net(images)
    # Hugging Face's LayerNorms of some families have an epsilon of 1e-12, timm's of 1e-6: measured up to 2e-5
    assert float((found - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("case", ["hf vit", "hf dinov2", "hf swin"])
def test_the_names_of_published_files_load_like_those_in_memory(tmp_path, case):
    make, _, tag = SAME[case]
    theirs = make()
    theirs.save_pretrained(tmp_path)
    torch.save(
        {"state_dict": {f"model.{key}": value for key, value in theirs.state_dict().items()}}, tmp_path / "m.ckpt"
    )
    published = load_net(spec_for(tag), str(tmp_path / "model.safetensors"))
    assert published.sha256 == load_net(spec_for(tag), str(tmp_path / "m.ckpt")).sha256
    assert "(names of Hugging Face's" in published.source


NOT_CONVERTED = {
    "torchvision's MobileNet-v3": (tv.mobilenet_v3_small, "mobilenetv3_small_100"),
    "torchvision's EfficientNet-v2": (tv.efficientnet_v2_s, "efficientnetv2_s"),
    "torchvision's EfficientNet-B5 to B7": (tv.efficientnet_b5, "efficientnet_b5"),
    "torchvision's Swin-v2": (tv.swin_v2_t, "swinv2_tiny_window8_256"),
    "Hugging Face's MobileNet-v2": (
        lambda: hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config()), "mobilenetv2_100"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_CONVERTED)
def test_what_is_known_and_not_converted_is_named_in_one_line(tmp_path, name):
    make, tag = NOT_CONVERTED[name]
    with torch.device("meta"):
        state = make().state_dict()
    torch.save({key: torch.zeros(value.shape, dtype=value.dtype) for key, value in state.items()}, tmp_path / "net.pth")
    with pytest.raises(UserError, match=f"names are those of {name}, which are not converted: .*MODULE=") as caught:
        load_net(resolve_model(tag), str(tmp_path / "net.pth"))
    assert "\n" not in str(caught.value)


def test_every_layout_that_is_not_converted_is_tried_above():
    assert {layout.name for layout in LAYOUTS if layout.why_not} == set(NOT_CONVERTED)
    assert all(bool(layout.names) != bool(layout.why_not) for layout in LAYOUTS)


def test_names_of_another_network_are_not_guessed(tmp_path):
    torch.save(tv.mobilenet_v2().state_dict(), tmp_path / "net.pth")
    with pytest.raises(UserError, match=r"conv_stem\.weight.*names are those of torchvision's MobileNet-v2"):
        load_net(resolve_model("efficientnet_b0"), str(tmp_path / "net.pth"))


def test_layers_of_another_shape_are_not_taken_by_their_order(tmp_path):
    torch.save(tv.mobilenet_v2(width_mult=0.5).state_dict(), tmp_path / "net.pth")
    with pytest.raises(UserError, match=r"missing: conv_stem\.weight"):
        load_net(resolve_model("mobilenetv2_100"), str(tmp_path / "net.pth"))


def test_a_network_of_torchvision_itself_keeps_its_names(tmp_path):
    (tmp_path / "mine.py").write_text("from torchvision.models import mobilenet_v2 as build")
    net = shaken(tv.mobilenet_v2())
    torch.save(net.state_dict(), tmp_path / "net.pth")
    from calib.weights.zoo import spec_of

    loaded = load_net(spec_of("", f"{tmp_path}/mine.py:build", (96, 96)), str(tmp_path / "net.pth"))
    assert torch.equal(loaded.net.features[18][0].weight, net.features[18][0].weight)
    assert "names of" not in loaded.source
