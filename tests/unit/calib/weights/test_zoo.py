import pytest
import timm

from calib.errors import UserError
from calib.weights.published import PUBLISHED
from calib.weights.zoo import ZOO, ModelSpec, resolve_model


@pytest.mark.parametrize("spec", ZOO.values(), ids=ZOO)
def test_every_tag_names_a_timm_checkpoint(spec):
    assert spec.builder or spec.tag in timm.list_models(pretrained=True)
    assert spec.published is None or spec.published in PUBLISHED


def test_short_name_pins_the_checkpoint_of_the_papers():
    assert resolve_model("vit_b").tag == "vit_base_patch16_224.augreg_in21k_ft_in1k"
    assert timm.get_pretrained_cfg("vit_base_patch16_224").tag != "augreg_in21k_ft_in1k"


@pytest.mark.parametrize("name", ["test_vit.r160_in1k", "test_vit"])
def test_timm_names_are_taken_as_they_are(name):
    assert resolve_model(name) == ModelSpec(name, name)


@pytest.mark.parametrize(
    ("typo", "suggestion"),
    [("vit-s", "'vit_s'"), ("resnet_50", "'resnet50'"), ("resnet18.tv_in1", "'resnet18.tv_in1k'")],
)
def test_unknown_model_suggests_out_of_short_and_timm_names(typo, suggestion):
    with pytest.raises(UserError) as caught:
        resolve_model(typo)
    text = str(caught.value)
    assert text.count(suggestion) == 1
    assert "\n" not in text


def test_known_architecture_with_an_unknown_tag_is_refused():
    assert timm.is_model("resnet18.no_such_tag")  # timm looks at the architecture alone
    with pytest.raises(UserError, match="no_such_tag"):
        resolve_model("resnet18.no_such_tag")
